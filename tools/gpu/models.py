"""Random models, batches and learners for the parts of the GPU check."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch

from megarl.algorithms.recipes import RECIPES
from megarl.batch import Batch
from megarl.config import parse_config
from megarl.data.plan import Deal, Share
from megarl.learner.learner import Learner
from megarl.learner.mesh import Mesh
from megarl.models.family import architecture, read_hf_config
from megarl.models.weights import hf_names, hf_shape

TOKENIZER = Path(__file__).resolve().parents[2] / "megarl/data/base_model"
GPU = torch.cuda.is_available()
_TOY = dict(num_attention_heads=4, num_key_value_heads=2, vocab_size=320)
_QWEN = dict(num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True)
SIZES: dict[str, dict[str, Any]] = {
    "toy": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, tie_word_embeddings=False, **_TOY),
    "toy, tied": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, tie_word_embeddings=True, **_TOY),
    "0.5B": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, **_QWEN),
    "1.5B": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, **_QWEN),
}


def random_model(size: str, folder: Path) -> Path:
    """A Hugging Face folder with random weights, made once: Qwen2's architecture, or Llama's for the tied toy."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, Qwen2Config

    folder = folder / "models" / size.replace(", ", "_")
    if (folder / "model.safetensors").exists():
        return folder
    llama = size == "toy, tied"
    made = (LlamaConfig if llama else Qwen2Config)(
        **SIZES[size], max_position_embeddings=4096, bos_token_id=None, eos_token_id=1, pad_token_id=0
    )
    made.architectures = ["LlamaForCausalLM" if llama else "Qwen2ForCausalLM"]
    made.save_pretrained(folder)
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    arch, device = architecture(read_hf_config(folder)), torch.device("cuda" if GPU else "cpu")
    generator = torch.Generator(device).manual_seed(0)

    def tensor(name: str) -> torch.Tensor:
        noise = torch.randn(hf_shape(name, arch), generator=generator, device=device)
        scale = 0.02 if arch.hidden_size > 256 else 0.05
        return (1 + 0.1 * noise if "norm" in name else scale * noise).bfloat16().cpu()

    tensors = {name: tensor(name) for name in sorted(hf_names(arch))}
    save_file(tensors, folder / "model.partial", metadata={"format": "pt"})
    (folder / "model.partial").rename(folder / "model.safetensors")  # whole, whenever a part is stopped
    return folder


def make_config(folder: Path, precision: str, prompt: int, response: int, **sections: dict[str, Any]) -> Any:
    base: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder), "precision": precision},
        "data": {"train": "arithmetic", "max_prompt_tokens": prompt},
        "rollout": {"max_response_tokens": response},
        "learner": {"micro_batch_tokens": 8192, "share_prompts": False},
        "optim": {"lr": 1e-6},
    }
    return parse_config(base | {name: base.get(name, {}) | values for name, values in sections.items()})


@cache
def mesh() -> Mesh:
    """The one rank of this process."""
    return Mesh(make_config(Path("none"), "fp32", 1, 1).learner)


def make_learner(config: Any, recipe: str = "reinforce", shard_optimizer: bool = True) -> Learner:
    hf_config, temperature = read_hf_config(config.model.path), config.rollout.temperature
    return Learner(config, RECIPES[recipe], hf_config, mesh(), temperature=temperature, shard_optimizer=shard_optimizer)


def layers_of(learner: Learner) -> str:
    """The class of the first layer's first product: Transformer Engine's begin with TE."""
    return type(learner.policy.module.decoder.layers[0].self_attention.linear_qkv).__name__


def make_batch(lengths: list[int], prompt: int, vocabulary: int, group: int = 4) -> Batch:
    """Sequences of these lengths, the first `prompt` tokens of each given, `group` to a prompt."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.tensor(lengths)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    total = int(cu_seqlens[-1])
    position = torch.arange(total) - torch.repeat_interleave(cu_seqlens[:-1], sizes)
    tokens = torch.randint(2, vocabulary, (total,), generator=generator)
    for i, start in enumerate(cu_seqlens[:-1].tolist()):
        first = int(cu_seqlens[i // group * group])
        tokens[start : start + prompt] = tokens[first : first + prompt]
    return Batch(
        tokens=tokens,
        cu_seqlens=cu_seqlens,
        mask=(position >= prompt).float(),
        advantages=torch.repeat_interleave(torch.randn(len(sizes), generator=generator), sizes),
        prompt_index=torch.arange(len(sizes)) // group,
        prompt_lengths=torch.full((len(sizes),), prompt),
        rollout_logprobs=torch.zeros(total),
    )


def in_order(deal: Deal, values: torch.Tensor) -> torch.Tensor:
    """Values of the tokens of this, the only, rank -> in the order of the batch that was dealt."""
    parts = values.split(deal.batch.lengths.tolist())
    return torch.cat([parts[i] for i in deal.plan.numbers(0).argsort().tolist()])


def score(learner: Learner, batch: Batch) -> torch.Tensor:
    """Log-probs f32[T] of the batch."""
    deal = learner.deal(batch)
    return in_order(deal, learner.score(deal.whole())[0])


def only_update(learner: Learner, batch: Batch) -> Share:
    """The update that learns from the whole batch."""
    (share,) = learner.updates(learner.deal(batch))
    return share

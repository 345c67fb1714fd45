"""Hugging Face folders: reads tensors, copies the parts that are not weights, writes whole models."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from huggingface_hub.utils import disable_progress_bars
from safetensors import safe_open
from torch import Tensor

from megarl.models.family import Architecture
from megarl.models.weights import hf_names, hf_shape
from megarl.types import UserError

_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json", ".h5", ".msgpack")


_IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # a buffer that old exports contain; it is computed here


class HuggingFaceFiles:
    """The tensors of a folder's safetensors files, read one at a time."""

    def __init__(self, folder: str | Path) -> None:
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise UserError(f"model.path={folder} has no *.safetensors file")
        self._files = {}
        for file in files:
            try:
                handle = safe_open(file, framework="pt")
            except Exception as error:  # safetensors raises its own type for truncated or foreign files
                raise UserError(f"{file} is not a readable safetensors file ({error})") from None
            self._files.update(dict.fromkeys(handle.keys(), handle))

    def check_names(self, arch: Architecture, folder: str | Path) -> None:
        """Raises UserError naming the tensors that are missing, that no layer here would read, or of a wrong shape."""
        expected, present = hf_names(arch), {name for name in self._files if not _IGNORED.search(name)}
        if arch.tied_embeddings:
            present.discard("lm_head.weight")
        for what, names in (("lacks", expected - present), ("has unknown tensors", present - expected)):
            if names:
                shown = ", ".join(sorted(names)[:3])
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise UserError(f"model.path={folder} {what}: {shown}{more}")
        for name in sorted(expected):
            shape, implied = self._files[name].get_slice(name).get_shape(), list(hf_shape(name, arch))
            if shape != implied:
                raise UserError(f"model.path={folder}: {name} has shape {shape}, config.json implies {implied}")

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def tensors(self, arch: Architecture) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) for all that a model of this architecture needs."""
        return ((name, self[name]) for name in sorted(hf_names(arch)))


def copy_model_files(source: str | Path, target: Path) -> None:
    """Copy configuration, generation configuration and tokenizer."""
    target.mkdir(parents=True, exist_ok=True)
    for file in Path(source).iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHT_FILES):
            shutil.copy2(file, target / file.name)


def save_hf_model(target: Path, source: str | Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a Hugging Face folder: these weights, everything else from `source`."""
    state = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors}
    copy_model_files(source, target)
    config_path = target / "config.json"
    config = json.loads(config_path.read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(next(iter(state.values())).dtype).removeprefix("torch.")
    config_path.write_text(json.dumps(config, indent=2) + "\n")
    disable_progress_bars()
    save_torch_state_dict(state, target, metadata={"format": "pt"}, max_shard_size="5GB")
    for file in target.glob("*.safetensors"):
        file.chmod(0o644)  # as any other file, not for its owner alone

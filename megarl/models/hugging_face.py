"""Hugging Face folders: reads tensors, copies the parts that are not weights, writes whole models."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from huggingface_hub.utils import disable_progress_bars
from safetensors import safe_open
from torch import Tensor

from megarl.files import read_json, refuse_pointer
from megarl.models.family import Architecture
from megarl.models.weights import hf_names, hf_shape
from megarl.types import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = 8192  # of two tensors compared at a time
_DTYPES = ("F64", "F32", "F16", "BF16")  # whatever else is stored means something else than its numbers
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ot", ".onnx", ".npz")
_WEIGHT_FILES = (".safetensors", ".index.json", *_OTHER_WEIGHTS)
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # a buffer that old exports contain; it is computed here


class HuggingFaceFiles:
    """The tensors of the files that transformers would load from a folder, read one at a time.

    Those are model.safetensors, else what model.safetensors.index.json names; `unread` are the other safetensors files.
    """

    def __init__(self, folder: str | Path) -> None:
        self._files: dict[str, Any] = {}
        place: dict[str, str] = {}
        files = _weight_files(Path(folder))
        for file in files:
            path = Path(folder) / file
            refuse_pointer(path)
            try:
                handle = safe_open(path, framework="pt")
            except Exception as error:  # safetensors raises its own type for truncated or foreign files
                raise UserError(f"{path} is not a readable safetensors file ({error})") from None
            for name in handle.keys():  # noqa: SIM118, a handle is no dictionary
                if name in place:
                    raise UserError(f"model.path={folder}: {name} is both in {place[name]} and in {file}; keep one")
                self._files[name], place[name] = handle, file
        present = {file.name for file in Path(folder).iterdir() if file.name.endswith((".safetensors", INDEX))}
        self.unread = sorted(present - {*files} - ({INDEX} if files != [SINGLE] else set()))

    def check_names(self, arch: Architecture, folder: str | Path) -> None:
        """Raises UserError naming the tensors that are missing, that no layer here would read, or of a wrong shape.

        Or of a type that isn't a number's, or that contradict the configuration.
        """
        expected, present = hf_names(arch), {name for name in self._files if not _IGNORED.search(name)}
        if arch.tied_embeddings:
            present.discard(HEAD)
        for what, names in (("lacks", expected - present), ("has unknown tensors", present - expected)):
            if names:
                raise UserError(f"model.path={folder} {what}: {_listed(names)}")
        for name in sorted(expected):
            stored = self._files[name].get_slice(name)
            shape, implied = stored.get_shape(), list(hf_shape(name, arch))
            if shape != implied:
                raise UserError(f"model.path={folder}: {name} has shape {shape}, config.json implies {implied}")
            if stored.get_dtype() not in _DTYPES:
                raise UserError(
                    f"model.path={folder}: {name} is stored as {stored.get_dtype()}, expected one of "
                    f"{', '.join(_DTYPES)}; quantised weights are not supported"
                )
        if arch.tied_embeddings and HEAD in self._files and not self._equal(EMBEDDING, HEAD):
            raise UserError(
                f"model.path={folder}: {HEAD} differs from {EMBEDDING}, but config.json ties them "
                "(tie_word_embeddings); set it to false, or remove the tensor that isn't the model's"
            )

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def tensors(self, arch: Architecture) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) for all that a model of this architecture needs."""
        return ((name, self[name]) for name in sorted(hf_names(arch)))

    def _equal(self, first: str, second: str) -> bool:
        left, right = (self._files[name].get_slice(name) for name in (first, second))
        shape = left.get_shape()
        return shape == right.get_shape() and all(
            torch.equal(left[i : i + ROWS].double(), right[i : i + ROWS].double()) for i in range(0, shape[0], ROWS)
        )


def _weight_files(folder: Path) -> list[str]:
    """The names of the files that transformers would load. Raises UserError where it would load something else."""
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"model.path={folder} holds an adapter (adapter_config.json); merge it into the model and save the result"
        )
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if (folder / INDEX).is_file():
        return _shards(folder)
    names = sorted(file.name for file in folder.iterdir())
    if found := [name for name in names if name.endswith(".safetensors")]:
        raise UserError(f"model.path={folder} has {_listed(found)} but neither {SINGLE} nor {INDEX}")
    others = [name for name in names if name.endswith(_OTHER_WEIGHTS)]
    instead = f"; save what is in {_listed(others)} in that format (save_pretrained)" if others else ""
    raise UserError(f"model.path={folder} has no *.safetensors file{instead}")


def _shards(folder: Path) -> list[str]:
    """The files that the index names, all of which are there."""
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{folder / INDEX} names no files; expected weight_map, a file for each tensor")
    names = sorted({str(PurePath(name)) for name in places.values()})
    for name in names:
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise UserError(f"{folder / INDEX} names {name}, which is outside the folder")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"model.path={folder} lacks {_listed(missing)}, named in {INDEX}")
    return names


def model_files(folder: str | Path) -> list[Path]:
    """What makes a Hugging Face folder besides its weights: configuration, generation configuration, tokenizer."""
    files = [*Path(folder).iterdir(), *Path(folder).glob("additional_chat_templates/*")]
    return [file for file in files if file.is_file() and not file.name.endswith(_WEIGHT_FILES)]


def copy_model_files(source: str | Path, target: Path) -> None:
    """Copy `model_files`: their contents alone, for a source may be read-only, links, or `target` itself."""
    target.mkdir(parents=True, exist_ok=True)
    if target.samefile(source):
        return
    for file in model_files(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        copy.unlink(missing_ok=True)
        shutil.copyfile(file, copy)


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


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

"""Which files of a folder are the model: what transformers loads, or a refusal; and what is copied of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarl.models.family import architecture, read_hf_config
from megarl.models.hugging_face import EMBEDDING, HEAD, INDEX, SINGLE, HuggingFaceFiles, copy_model_files, save_hf_model
from megarl.types import UserError


def held(folder):
    """name -> tensor in fp32, of all that the model is."""
    arch, files = architecture(read_hf_config(folder)), HuggingFaceFiles(folder)
    files.check_names(arch, folder)
    tensors = {name: tensor.float() for name, tensor in files.tensors(arch)}
    return tensors | ({HEAD: tensors[EMBEDDING]} if arch.tied_embeddings else {})


def loaded_by_transformers(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.state_dict()


def tensors_of(folder):
    return load_file(folder / SINGLE)


def write(folder, tensors, name=SINGLE):
    save_file(tensors, folder / name, metadata={"format": "pt"})


def change_tensors(folder, change):
    write(folder, change(tensors_of(folder)))


def change_config(folder, **fields):
    path = folder / "config.json"
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))


def shard(folder, count=3, place="model-{:05d}-of-{:05d}.safetensors", **more):
    """Cut model.safetensors into shards with an index."""
    tensors = tensors_of(folder)
    names, weight_map = sorted(tensors), {}
    for i in range(count):
        file = place.format(i + 1, count)
        (folder / file).parent.mkdir(exist_ok=True)
        write(folder, {name: tensors[name] for name in names[i::count]}, file)
        weight_map |= dict.fromkeys(names[i::count], file)
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map | more}))


def shard_beside_another_export(folder):
    stale = {name: tensor + 1 for name, tensor in tensors_of(folder).items()}
    shard(folder)
    write(folder, stale, "model-00001-of-00002.safetensors")
    write(folder, stale, "zzz.safetensors")


def index_beside_the_whole(folder):
    whole = {name: tensor + 1 for name, tensor in tensors_of(folder).items()}
    shard(folder)
    write(folder, whole)


def link_as_the_hub_cache_does(folder):
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        shutil.move(file, blobs / str(i))
        file.symlink_to(Path("..") / "blobs" / str(i))


def swap_files_in_index(folder):
    """The index is wrong about which of its files holds what."""
    shard(folder, 2)
    index = json.loads((folder / INDEX).read_text())
    one, two = sorted(set(index["weight_map"].values()))
    index["weight_map"] = {name: two if file == one else one for name, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


def name_files_by_paths(folder):
    shard(folder, 2)
    index = json.loads((folder / INDEX).read_text())
    for i, name in enumerate(sorted(index["weight_map"])):
        index["weight_map"][name] = "./" * (i % 2) + index["weight_map"][name]
    (folder / INDEX).write_text(json.dumps(index))


# name -> (family, what is done to the folder, the safetensors files that aren't read)
HELD = {
    "one file": ("qwen2", lambda folder: None, []),
    "tied": ("llama", lambda folder: None, []),
    "shards beside stale ones": (
        "qwen2",
        shard_beside_another_export,
        ["model-00001-of-00002.safetensors", "zzz.safetensors"],
    ),
    "shards of a tied model": ("llama", shard, []),
    "one file beside an index": (
        "qwen2",
        index_beside_the_whole,
        [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), INDEX],
    ),
    "shards in a folder": ("qwen2", lambda folder: shard(folder, place="shards/{}-{}.safetensors"), []),
    "an index that mistakes its files": ("qwen2", swap_files_in_index, []),
    "an index with paths": ("qwen2", name_files_by_paths, []),
    "links into a cache": ("qwen2", link_as_the_hub_cache_does, []),
    "shards and links": ("llama", lambda folder: (shard(folder), link_as_the_hub_cache_does(folder)), []),
    "the tied head once more": ("llama", lambda f: change_tensors(f, lambda t: t | {HEAD: t[EMBEDDING].clone()}), []),
    "no word about ties": ("qwen2", lambda folder: change_config(folder, tie_word_embeddings="absent"), []),
    "bf16": ("qwen2", lambda f: change_tensors(f, lambda t: {name: v.bfloat16() for name, v in t.items()}), []),
    "fp16": ("llama", lambda f: change_tensors(f, lambda t: {name: v.half() for name, v in t.items()}), []),
    "fp64": ("qwen2", lambda f: change_tensors(f, lambda t: {name: v.double() for name, v in t.items()}), []),
    "a variant": (
        "qwen2",
        lambda f: write(f, {name: v + 1 for name, v in tensors_of(f).items()}, "model.fp16.safetensors"),
        ["model.fp16.safetensors"],
    ),
    "a pickle": ("qwen2", lambda f: torch.save({"lm_head.weight": torch.ones(1)}, f / "pytorch_model.bin"), []),
}


@pytest.mark.parametrize("case", HELD)
def test_a_folder_holds_what_transformers_loads_from_it(case, request, tmp_path):
    family, change, unread = HELD[case]
    folder = shutil.copytree(request.getfixturevalue(family), tmp_path / "model")
    change(folder)
    ours, theirs = held(folder), loaded_by_transformers(folder)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert HuggingFaceFiles(folder).unread == unread


def rename(folder, name):
    (folder / SINGLE).rename(folder / name)


def repeat_in_two_shards(folder):
    shard(folder, 2)
    second = load_file(folder / "model-00002-of-00002.safetensors")
    write(folder, second | {HEAD: torch.ones(51, 128)}, "model-00002-of-00002.safetensors")


def point(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 988097824\n")


def without(name):
    return lambda folder: change_tensors(folder, lambda tensors: {n: t for n, t in tensors.items() if n != name})


NORM = "model.norm.weight"
# name -> (family, what is done to the folder, words of the refusal)
REFUSED = {
    "a head that contradicts its tie": (
        "llama",
        lambda f: change_tensors(f, lambda t: t | {HEAD: t[EMBEDDING] + 1e-6}),
        "lm_head.weight differs from model.embed_tokens.weight, but config.json ties them",
    ),
    "a tied head of another shape": (
        "llama",
        lambda f: change_tensors(f, lambda t: t | {HEAD: t[EMBEDDING][:50].clone()}),
        "lm_head.weight differs",
    ),
    "no head": ("qwen2", without(HEAD), "lacks: lm_head.weight"),
    "no embedding": ("llama", without(EMBEDDING), "lacks: model.embed_tokens.weight"),
    "a missing shard": (
        "qwen2",
        lambda f: (shard(f), (f / "model-00002-of-00003.safetensors").unlink()),
        f"lacks model-00002-of-00003.safetensors, named in {INDEX}",
    ),
    "a shard elsewhere": ("qwen2", lambda f: shard(f, x="../model.safetensors"), "names ../model.safetensors, which"),
    "an absolute shard": (
        "qwen2",
        lambda f: shard(f, x="/tmp/x.safetensors"),
        "names /tmp/x.safetensors, which is outs",
    ),
    "an empty index": (
        "qwen2",
        lambda f: (shard(f), (f / INDEX).write_text('{"metadata": {}, "weight_map": {}}')),
        "names no files",
    ),
    "a broken index": ("qwen2", lambda f: (shard(f), (f / INDEX).write_text('{"weight_map":')), "is not JSON"),
    "an index of another kind": ("qwen2", lambda f: (shard(f), (f / INDEX).write_text("[]")), "holds list"),
    "a tensor in two shards": (
        "qwen2",
        repeat_in_two_shards,
        f"{HEAD} is both in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors",
    ),
    "shards without an index": (
        "qwen2",
        lambda f: (shard(f), (f / INDEX).unlink()),
        "has model-00001-of-00003.safetensors, model-00002-of-00003.safetensors, model-00003-of-00003.safetensors but",
    ),
    "another name": ("qwen2", lambda f: rename(f, "consolidated.safetensors"), "has consolidated.safetensors but"),
    "a variant alone": ("qwen2", lambda f: rename(f, "model.fp16.safetensors"), "has model.fp16.safetensors but"),
    "a link to nothing": (
        "qwen2",
        lambda f: ((f / SINGLE).unlink(), (f / SINGLE).symlink_to("../blobs/0f")),
        f"{SINGLE} links to ../blobs/0f, which is not there; restore that, or remove the link",
    ),
    "a file of the tokenizer that links to nothing": (
        "llama",
        lambda f: ((f / "tokenizer_config.json").unlink(), (f / "tokenizer_config.json").symlink_to("gone")),
        "tokenizer_config.json links to gone, which is not there",
    ),
    "pickles alone": (
        "qwen2",
        lambda f: rename(f, "pytorch_model.bin"),
        "has no *.safetensors file; save what is in pytorch_model.bin in that format",
    ),
    "an adapter": ("qwen2", lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter"),
    "a pointer": ("qwen2", lambda f: point(f / SINGLE), f"{SINGLE} is a git-lfs pointer, not the file itself"),
    "a pointer of a shard": (
        "qwen2",
        lambda f: (shard(f), point(f / "model-00001-of-00003.safetensors")),
        "model-00001-of-00003.safetensors is a git-lfs pointer",
    ),
    "a pointer of the index": ("qwen2", lambda f: (shard(f), point(f / INDEX)), f"{INDEX} is a git-lfs pointer"),
    "a model without its prefix": (
        "qwen2",
        lambda f: change_tensors(f, lambda t: {name.removeprefix("model."): v for name, v in t.items()}),
        "lacks: model.embed_tokens.weight",
    ),
    "a wrapper's prefix": (
        "qwen2",
        lambda f: change_tensors(f, lambda t: {f"module.{name}": v for name, v in t.items()}),
        "lacks: lm_head.weight",
    ),
    "integers": (
        "qwen2",
        lambda f: change_tensors(f, lambda t: t | {NORM: t[NORM].to(torch.int8)}),
        "model.norm.weight is stored as I8",
    ),
    "eight-bit floats": (
        "qwen2",
        lambda f: change_tensors(f, lambda t: t | {NORM: t[NORM].to(torch.float8_e4m3fn)}),
        "model.norm.weight is stored as F8_E4M3",
    ),
    "nothing in a tensor": (
        "qwen2",
        lambda f: change_tensors(f, lambda t: t | {NORM: torch.empty(0)}),
        "model.norm.weight has shape [0], config.json implies [128]",
    ),
    "one layer more": (
        "llama",
        lambda f: change_tensors(f, lambda t: t | {"model.layers.4.input_layernorm.weight": torch.ones(128)}),
        "has unknown tensors: model.layers.4.input_layernorm.weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_is_not_one_whole_model_is_refused_in_a_line(case, request, tmp_path):
    family, change, words = REFUSED[case]
    folder = shutil.copytree(request.getfixturevalue(family), tmp_path / "model")
    change(folder)
    with pytest.raises(UserError) as caught:
        held(folder)
    message = str(caught.value)
    assert words in message and str(folder) in message and "\n" not in message


@pytest.fixture
def read_only(qwen2, tmp_path):
    """A model whose files nobody may write to, with templates in their folder."""
    folder = shutil.copytree(qwen2, tmp_path / "read_only")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o444)
    return folder


def names(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_copies_of_a_read_only_model_are_ones_own(read_only, tmp_path):
    for _ in range(2):  # over itself too
        copy_model_files(read_only, tmp_path / "copy")
    assert names(tmp_path / "copy") == names(read_only) - {SINGLE}
    assert all(file.stat().st_mode & 0o200 for file in (tmp_path / "copy").rglob("*"))


def test_links_are_copied_as_files(qwen2, tmp_path):
    folder = shutil.copytree(qwen2, tmp_path / "model")
    link_as_the_hub_cache_does(folder)
    copy_model_files(folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "blobs")
    assert names(tmp_path / "copy") == names(qwen2) - {SINGLE}


def test_a_model_is_saved_beside_itself_and_over_a_read_only_one(read_only, tmp_path):
    tensors, target = tensors_of(read_only), tmp_path / "saved"
    shutil.copytree(read_only, target)
    doubled = {name: tensor * 2 for name, tensor in tensors.items()}
    for source in (read_only, target):
        save_hf_model(target, source, doubled.items())
        assert held(target).keys() == tensors.keys()
        assert all(torch.equal(tensor, doubled[name]) for name, tensor in held(target).items())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in held(read_only).items())

"""Shared by all tests: tiny models made on the spot, a way to run a rank program, and what is quick."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: kernels run on CPU tensors
VOCABULARY = 51  # odd, so that tensor-parallel shards are padded


def make_model(folder: Path, family: str, seed: int = 0) -> Path:
    """A random model with 4 layers, 4 query heads, 2 key-value heads; every parameter differs from its neighbours."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    from megarl.data import arithmetic

    shape = {
        "hidden_size": 128,  # heads of 32: the smallest that vLLM serves on a CPU
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "vocab_size": VOCABULARY,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    if family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=False))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.08)
    model.save_pretrained(folder)
    arithmetic.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2")


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="session")
def run_ranks():
    """run_ranks(program, ranks, *arguments): a Python file as so many ranks; fails with its output."""

    def run(program: Path, ranks: int, *arguments: object) -> str:
        command = [sys.executable, Path(__file__).with_name("fork_ranks.py"), ranks, program, *arguments]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return done.stdout

    return run


def pytest_configure(config):
    """A test that starts processes says so by its mark, or fails: `make test-fast` runs those that don't."""
    starts = {"subprocess.Popen", "os.fork", "os.posix_spawn"}
    config.running = None  # the test whose setup, call or teardown this is

    def watch(event, arguments):
        item = config.running
        if event in starts and item and os.getpid() == ours and not MAY_START & {m.name for m in item.iter_markers()}:
            raise AssertionError(f"{item.nodeid} starts a process ({arguments[:2]}): mark it pytest.mark.processes")

    ours = os.getpid()
    sys.addaudithook(watch)


def pytest_collection_modifyitems(items):
    """Files that start processes first: they take longest, and no worker should begin with one at the end."""
    files = {item.path for item in items if MAY_START & {mark.name for mark in item.iter_markers()}}
    items.sort(key=lambda item: item.path not in files)


MAY_START = {"processes", "launch"}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    item.config.running = item
    try:
        return (yield)
    finally:
        item.config.running = None

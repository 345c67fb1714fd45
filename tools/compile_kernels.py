"""Compile every kernel that ships for an H100, without a GPU, and refuse those that spill or need too much memory.

    python tools/compile_kernels.py [KERNEL.OPTION=VALUE ...] [--only KERNEL]

The launchers of `megarl/ops/kernels.py` are called, as in training, with tensors that have types and shapes but no
memory; what they would launch is compiled instead. So types, strides and options are those of a run: every device of
`tuning.KERNELS`, every type, and the rule of every shipped recipe. KERNEL.OPTION=VALUE tries another option, for
example `logit_stats.num_warps=8`. Fails if a kernel uses stack, spills registers, needs over 227 KiB of shared
memory, or counts rows' offsets in 32 bits.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

ARCHITECTURE = 90
SHARED_LIMIT = 227 * 1024  # bytes of an H100's block
COLUMNS = ("kernel", "variant", "options", "registers", "stack", "spills", "shared", "cubin", "128-bit loads")


@dataclass(frozen=True)
class Pointer:
    """What Triton asks of a tensor."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


class OnGpu(torch.Tensor):
    """A tensor without memory that is taken for one on a GPU; so are those computed from it."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


class Shape(NamedTuple):
    """Of the arguments; Triton compiles anew for numbers divisible by 16, for those that aren't, and for 1."""

    name: str
    tokens: int
    columns: int
    valid: int
    address: int


SHAPES = (
    Shape("aligned", 8192, 151936, 151936, 0),
    Shape("padded vocabulary", 8192, 151936, 151665, 0),
    Shape("odd", 1001, 50257, 50257, 2),
)


@dataclass(frozen=True)
class Launch:
    """One compilation: a kernel with its arguments and options."""

    device: str
    shape: str
    kernel: str  # name in megarl.ops.kernels
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]

    @property
    def identity(self) -> tuple:
        """Equal for launches that run the same code."""
        return self.kernel, tuple(map(_kind, self.arguments)), self.keywords

    @property
    def options(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.keywords if _is_option(name))

    @property
    def variant(self) -> str:
        types = [str(a.dtype).removeprefix("torch.") for a in self.arguments if isinstance(a, Pointer)]
        of_data = (
            [types[0]] if types[0] == types[-1] or "logit_grad" not in self.kernel else [types[0], "to", types[-1]]
        )
        fixed = [
            name if value is True else str(value)
            for name, value in self.keywords
            if not _is_option(name) and value is not False
        ]
        slices = [f"{a} slices" for a in self.arguments if isinstance(a, int) and a < 64]
        return " ".join([*of_data, *fixed, *slices, *([] if self.shape == "aligned" else [f"({self.shape})"])])

    def __str__(self) -> str:
        return f"{self.kernel} [{self.variant}] with {self.options} ({self.device})"


class Resources(NamedTuple):
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    cubin: int
    wide_loads: int
    narrow_offsets: int  # of arguments, that are counted in 32 bits

    @property
    def problem(self) -> str | None:
        if self.narrow_offsets:
            return f"{self.narrow_offsets} offsets of rows in 32 bits, which 50,000 tokens of 151,936 logits exceed"
        if self.stack or self.spill_stores or self.spill_loads:
            return f"{self.stack} B of stack, {self.spill_stores} B spilled, {self.spill_loads} B of spills loaded"
        return f"{self.shared} B of shared memory" if self.shared > SHARED_LIMIT else None


class Recorder:
    """Stands where a kernel stood and keeps what it was launched with."""

    def __init__(self, name: str, launches: list[tuple[str, tuple, dict]], address: int) -> None:
        self.name, self.launches, self.address = name, launches, address

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **keywords: Any) -> None:
            described = (Pointer(a.dtype, self.address) if isinstance(a, torch.Tensor) else a for a in arguments)
            self.launches.append((self.name, tuple(described), keywords))

        return launch


def launches(device: str, changes: dict[str, dict[str, int]]) -> Iterator[Launch]:
    """Everything that can be launched with a device's options."""
    from megarl.ops import kernels, tuning

    known = {name: kernel for name, kernel in vars(kernels).items() if name.endswith("_kernel")}
    tuned = kernels.tuned
    try:
        kernels.tuned = lambda op: {**tuning.KERNELS[device][op], **changes.get(op, {})}  # type: ignore[assignment]
        for shape in SHAPES:
            seen: list[tuple[str, tuple, dict]] = []
            for name in known:
                setattr(kernels, name, Recorder(name, seen, shape.address))
            _launch_all(shape)
            for name, arguments, keywords in seen:
                yield Launch(device, shape.name, name, arguments, tuple(keywords.items()))
            if missing := known.keys() - {name for name, _, _ in seen}:
                sys.exit(f"never launched, so not compiled: {', '.join(sorted(missing))}; add them to _launch_all")
    finally:
        kernels.tuned = tuned
        for name, kernel in known.items():
            setattr(kernels, name, kernel)


def _launch_all(shape: Shape) -> None:
    from megarl.algorithms.loss import token_rule
    from megarl.ops import kernels
    from megarl.ops.epilogue import policy_epilogue

    def array(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta").as_subclass(OnGpu)

    tokens = shape.tokens
    targets, value = array(tokens, dtype=torch.int64), array(tokens)
    slice_ = (shape.columns, shape.valid, 1.0)  # of the second rank of two: it starts where the first one ends
    keeps = (None, array(tokens, dtype=torch.bool))
    half = (torch.bfloat16, torch.float16)
    for dtype, keep in itertools.product((torch.float32, *half), keeps):
        logits = array(tokens, shape.columns, dtype=dtype)
        kernels.logit_stats(logits, targets, keep, *slice_)
        for out, by_entropy in itertools.product({dtype, *half} if dtype == torch.float32 else {dtype}, (None, value)):
            grad = array(*logits.shape, dtype=out)
            kernels.logit_grad(logits, targets, keep, value, value, value, value, by_entropy, *slice_, grad)
    for dtype, out in (
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ):
        # The last tile of `linear_logprob`: rows of a multiple of 16 numbers, of which fewer are the vocabulary's.
        logits, grad = (array(1024, 8192, dtype=kind)[:, : shape.columns % 8192] for kind in (dtype, out))
        kernels.logit_stats(logits, targets, None, 0, logits.size(1), 1.0)
        for by_entropy in (None, value):
            arguments = (value, value, value, value, by_entropy, 0, logits.size(1), 1.0)
            kernels.logit_grad(logits, targets, None, *arguments, grad)
    for slices in (1, 5, 16):
        kernels.merge_stats(array(slices, tokens, 4), 1.0)
    for recipe, correction in itertools.product(shipped_recipes(), (None, value)):
        given = {"correction": correction, "entropy": value, "ref_logprobs": value}
        policy_epilogue(token_rule(recipe), value, value, value, value, **given)


def shipped_recipes() -> list[Any]:
    """Every recipe with every variant; DPO's loss has no epilogue."""
    from megarl.algorithms.recipe import Recipe
    from megarl.algorithms.recipes import RECIPES, SFT, VARIANTS

    named = [Recipe.named(name, variant) for name in RECIPES for variant in VARIANTS]
    return [recipe for recipe in (*named, SFT) if recipe.objective == "policy_gradient"]


def _is_option(name: str) -> bool:
    return name.startswith(("BLOCK_", "num_"))


def _kind(argument: Any) -> Any:
    """What of a launch's argument decides the code: see Triton's specialisation of arguments."""
    if isinstance(argument, Pointer):
        return argument
    if isinstance(argument, int):
        return argument if argument == 1 else (argument % 16 == 0, argument >= 2**31)
    return type(argument)


class _Driver:
    """Tells Triton that it compiles for the GPU that isn't there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", ARCHITECTURE, 32)


def compile_launch(launch: Launch) -> Resources:
    from triton import runtime

    from megarl.ops import kernels

    runtime.driver.set_active(_Driver())
    kernel = getattr(kernels, launch.kernel)
    return measure(kernel.warmup(*launch.arguments, grid=(1,), **dict(launch.keywords)))


def measure(compiled: Any) -> Resources:
    """What the compiled kernel takes of the GPU, by NVIDIA's tools, which Triton brings along."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"

    def run(*command: object) -> str:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        usage = run(tools / "cuobjdump", "-res-usage", cubin)
        assembly = run(tools / "nvdisasm", "-c", cubin)
        log = run(tools / "ptxas", "-v", f"--gpu-name=sm_{ARCHITECTURE}a", ptx, "-o", Path(folder, "again"))
        size = cubin.stat().st_size
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log).groups()  # type: ignore[union-attr]
    wide = len(re.findall(r"LD(?:G|GSTS)\.E\S*\.128", assembly))
    narrow = narrow_offsets(compiled.asm["ttir"])
    shared = compiled.metadata.shared
    return Resources(int(registers), int(stack), int(spills[0]), int(spills[1]), shared, size, wide, narrow)


def narrow_offsets(code: str) -> int:
    """How many of the offsets added to a kernel's arguments (not to a row found already) are 32-bit numbers.

    Triton's interpreter can't tell: there, all of them are of 64 bits.
    """
    arguments = set(re.findall(r"(%\w+): !tt\.ptr", code))
    arguments |= {name for name, source in re.findall(r"(%\w+) = tt\.splat (%\w+)", code) if source in arguments}
    offsets = re.findall(r"tt\.addptr (%\w+), %\w+ : [^,]+, (\S+)", code)
    return sum(base in arguments and "i64" not in kind for base, kind in offsets)


def parse_changes(texts: list[str]) -> dict[str, dict[str, int]]:
    from megarl.ops.tuning import KERNELS

    changes: dict[str, dict[str, int]] = {}
    for text in texts:
        found = re.fullmatch(r"(\w+)\.(\w+)=(\d+)", text)
        if not found or any(found[2] not in row.get(found[1], {}) for row in KERNELS.values()):
            raise SystemExit(f"{text!r} is not KERNEL.OPTION=VALUE with a kernel and an option of megarl/ops/tuning.py")
        changes.setdefault(found[1], {})[found[2]] = int(found[3])
    return changes


def table(rows: list[tuple[Launch, Resources]]) -> str:
    lines = [COLUMNS] + [
        (
            launch.kernel.removesuffix("_kernel"),
            launch.variant,
            launch.options,
            str(r.registers),
            str(r.stack),
            f"{r.spill_stores}/{r.spill_loads}",
            str(r.shared),
            str(r.cubin),
            str(r.wide_loads),
        )
        for launch, r in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="KERNEL.OPTION=VALUE", help="try this instead of what is tuned")
    parser.add_argument("--only", metavar="KERNEL", help="compile this kernel only")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("TRITON_INTERPRET is set, which runs kernels in Python instead of compiling them; unset it")
    try:
        import triton
    except ImportError:
        sys.exit(f"the kernels can't be compiled without Triton: {sys.executable} -m pip install triton")

    from megarl.ops.tuning import KERNELS

    changes = parse_changes(arguments.changes)
    wanted: dict[tuple, Launch] = {}
    for device in KERNELS:
        for launch in launches(device, changes):
            if arguments.only in (None, launch.kernel.removesuffix("_kernel")):
                wanted.setdefault(launch.identity, launch)
    if not wanted:
        sys.exit(f"--only {arguments.only}: no such kernel")
    with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
        rows = list(zip(wanted.values(), pool.map(compile_launch, wanted.values()), strict=True))
    print(table(sorted(rows, key=lambda row: row[0].kernel)))
    failed = [f"{launch}: {resources.problem}" for launch, resources in rows if resources.problem]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        sys.exit(f"refused: {failed[0]}{more}")
    print(f"{len(rows)} kernels compiled for sm_{ARCHITECTURE} with Triton {triton.__version__}; no stack, no spills")


if __name__ == "__main__":
    main()

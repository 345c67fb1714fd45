"""Time, memory and error of the fused loss kernels, against floors of the device, plain torch and published kernels.

    python tools/bench/kernels.py [--tokens 8192] [--vocabulary 151936] [--hidden 3584] [--tp 1] [--out FOLDER]
    python tools/bench/kernels.py --device cpu        # small shapes; says nothing about a GPU

Everything runs in one process on the same inputs, in blocks whose order rotates and turns round. Times are of the
forward pass with its backward pass unless the entry is one kernel; memory is the peak beyond the inputs, results
included; errors are the largest against float64. Writes a table, JSON and a plot.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from kernel_entries import ENTRIES, PRODUCT_ALONE, Entry, Inputs, Result, Run
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {"cuda": (8192, 151936, 3584), "cpu": (512, 32000, 256)}
ON_CPU = "Measured on a CPU, where the ops are plain torch: this says nothing about the speed of a GPU."
ERRORS = ("logprob", "entropy", "by_logits", "by_hidden", "by_weight")


def make_inputs(tokens: int, columns: int, width: int, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    hidden, weight = normal(tokens, width).bfloat16(), (normal(columns, width) * (3 / width**0.5)).bfloat16()
    logits = hidden @ weight.t()
    targets = torch.randint(0, columns, (tokens,), generator=generator, device=device)
    return Inputs(hidden, weight, logits, targets, normal(tokens), normal(tokens), torch.empty_like(logits))


class Exact:
    """What the entries should compute, in float64, some rows at a time."""

    ROWS = 256

    def __init__(self, x: Inputs) -> None:
        self.x = x
        self.known: dict[tuple, Result] = {}

    def of(self, family: str, with_entropy: bool, with_gradient: bool) -> Result:
        key = (family, with_entropy, with_gradient)
        if key not in self.known:
            self.known = {key: self._compute(*key)}  # one at a time: a gradient takes gigabytes
        return self.known[key]

    def _compute(self, family: str, with_entropy: bool, with_gradient: bool) -> Result:
        x, parts = self.x, []
        weight = x.weight.double() if family == "hidden" else x.weight
        by_weight = torch.zeros_like(weight) if family == "hidden" and with_gradient else None
        for start in range(0, len(x.targets), self.ROWS):
            cut = slice(start, start + self.ROWS)
            hidden = x.hidden[cut].double()
            log_p = (x.logits[cut].double() if family == "logits" else hidden @ weight.t()).log_softmax(-1)
            p, ids = log_p.exp(), x.targets[cut].unsqueeze(-1)
            logprob, entropy = log_p.gather(-1, ids).squeeze(-1), -(p * log_p).sum(-1)
            grad = None
            if with_gradient:
                g, g_h = x.by_logprob[cut, None].double(), x.by_entropy[cut, None].double() * with_entropy
                grad = -p * (g + g_h * (log_p + entropy.unsqueeze(-1)))
                grad.scatter_add_(-1, ids, g)
                if by_weight is not None:
                    by_weight += grad.t() @ hidden
                    grad = grad @ weight
            parts.append((logprob, entropy, None if grad is None else grad.float() if family == "logits" else grad))
        values = [None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True)]
        of_tokens, of_entropy, by_input = values
        if family == "logits":
            return Result(of_tokens, of_entropy, by_logits=by_input)
        return Result(of_tokens, of_entropy, by_hidden=by_input, by_weight=by_weight)


def errors(entry: Entry, result: Any, exact: Exact) -> dict[str, float]:
    """The largest absolute error of each thing computed; gradients stored in 16 bits also as a multiple of the error of
    rounding the exact one."""
    if not isinstance(result, Result):
        return {}
    with_entropy = result.entropy is not None or result.logprob is None
    with_gradient = result.by_logits is not None or result.by_hidden is not None
    expected, found = exact.of(entry.family, with_entropy, with_gradient), {}
    for name in ERRORS:
        actual, value = getattr(result, name), getattr(expected, name)
        if actual is None:
            continue
        found[name] = _largest(actual, value)
        if actual.dtype in (torch.bfloat16, torch.float16) and name.startswith("by_"):
            found[f"{name}/rounding"] = found[name] / _largest(value, value, actual.dtype)
    return found


def _largest(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> float:
    pairs = zip(actual.split(1024), expected.split(1024), strict=True)
    return max(((a.to(dtype) if dtype else a).double() - e.double()).abs().max().item() for a, e in pairs)


def once(run: Run, device: torch.device) -> float:
    """Seconds."""
    if device.type == "cpu":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_bytes(run: Run, device: torch.device) -> int:
    """The most memory in use during a run beyond what is in use before it, the results included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    del result
    total = peak = 0
    events = (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def measure(x: Inputs, repeats: int, blocks: int, only: list[str] | None) -> tuple[list[dict], dict[str, str]]:
    """(rows, why an entry has none)."""
    device, exact = x.logits.device, Exact(x)
    running: list[tuple[Entry, Run, dict]] = []
    absent: dict[str, str] = {}
    for entry in sorted(ENTRIES, key=lambda e: e.family):
        if only and entry.family != "floor" and entry.name not in only:
            continue
        label = f"{entry.family}: {entry.name}"
        if entry.gpu_only and not x.on_gpu:
            absent[label] = "needs a GPU"
            continue
        try:
            run = entry.make(x)
            for _ in range(2):
                prepare(entry, x)
                result = run()
            row: dict[str, Any] = {"family": entry.family, "name": entry.name, "ours": _is_ours(entry), "seconds": []}
            row["errors"] = errors(entry, result, exact)
            del result
            prepare(entry, x)
            row["peak_bytes"] = peak_bytes(run, device)
        except ModuleNotFoundError as error:
            absent[label] = f"not installed (pip install {entry.package}; lacks {error.name})"
        except Exception as error:  # one entry's failure must not lose the others' numbers
            absent[label] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150] if str(error) else ''}"
        else:
            running.append((entry, run, row))
    exact.known.clear()
    for block in range(blocks):
        at = block * len(running) // blocks
        order = running[at:] + running[:at]
        for entry, run, row in order[:: -1 if block % 2 else 1]:
            prepare(entry, x)
            run()  # whatever ran before has the caches
            for _ in range(repeats):
                prepare(entry, x)
                row["seconds"].append(once(run, device))
    return [row for _, _, row in running], absent


def prepare(entry: Entry, x: Inputs) -> None:
    if entry.prepare:
        entry.prepare(x)


def _is_ours(entry: Entry) -> bool:
    return entry.family != "floor" and entry.package is None and not entry.name.startswith("torch")


def summarise(rows: list[dict]) -> None:
    """Adds quantiles, and each entry's time over its floors'."""
    for row in rows:
        seconds = torch.tensor(row["seconds"])
        row["p10"], row["p50"], row["p90"] = seconds.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    floors = {row["name"]: row["p50"] for row in rows if row["family"] == "floor"}
    floors["read of the logits"] = floors["copy of the logits"] / 2  # a copy reads and writes
    needs = {(entry.family, entry.name): entry.floor for entry in ENTRIES}
    for row in rows:
        floor = sum(floors[name] for name in needs[row["family"], row["name"]])
        row["over_floor"] = row["p50"] / floor if floor else None


def bars(rows: list[dict], tokens: int, width: int, tile_bytes: int) -> list[tuple[str, float | None, float]]:
    """(what, measured, at most): the design's bars. One process stands for a group of any size, so TP counts as 1."""
    by = {(row["family"], row["name"]): row for row in rows}

    def get(family: str, name: str, *keys: str) -> float | None:
        value: Any = by.get((family, name))
        for key in keys:
            value = value.get(key) if value else None
        return value

    stats = (16 * 2 + 36) * tokens
    linear = "linear_logprob"
    found = [
        ("logit_stats: time over the floor", get("logits", "logit_stats", "over_floor"), 1 / 0.85),
        ("logit_grad: time over the floor", get("logits", "logit_grad", "over_floor"), 1 / 0.85),
        ("logit_grad, in place: time over the floor", get("logits", "logit_grad, in place", "over_floor"), 1 / 0.85),
        ("linear_logprob: time over its four products", get("hidden", linear, "over_floor"), 1.2),
        ("logit_stats: bytes", get("logits", "logit_stats", "peak_bytes"), stats),
        ("logit_grad, in place: bytes", get("logits", "logit_grad, in place", "peak_bytes"), 0),
        ("linear_logprob: bytes beyond the gradient of the weight", None, tile_bytes + 4 * tokens * width),
    ]
    if (peak := get("hidden", linear, "peak_bytes")) is not None:
        found[-1] = (found[-1][0], peak - by["hidden", linear]["weight_gradient_bytes"], found[-1][2])
    for family, name in (("logits", "logprob_and_entropy"), ("hidden", linear)):
        for of, called, limit in (("logprob", "log-prob", 2e-5), ("entropy", "entropy", 1e-5)):
            of_product = get(family, PRODUCT_ALONE, "errors", of) or 0.0
            found.append((f"{name}: {called} error", get(family, name, "errors", of), limit + 1.5 * of_product))
        for of in ("by_logits", "by_hidden", "by_weight"):
            if (value := get(family, name, "errors", f"{of}/rounding")) is not None:
                found.append((f"{name}: {of} error over that of rounding", value, 1.1))
    return found


def table(rows: list[dict], absent: dict[str, str]) -> str:
    head = ["entry", "p10 ms", "p50 ms", "p90 ms", "over floor", "peak MiB", "log-prob error", "entropy error"]
    lines = []
    for family in ("floor", "logits", "hidden", "epilogue"):
        lines += [f"\n**{family}**\n", "| " + " | ".join([*head, "gradient error (over rounding)"]) + " |"]
        lines.append("|" + " --- |" * (len(head) + 1))
        for row in (r for r in rows if r["family"] == family):
            e = row["errors"]
            gradients = [
                f"{e[name]:.1e}" + (f" ({e[f'{name}/rounding']:.2f})" if f"{name}/rounding" in e else "")
                for name in ERRORS[2:]
                if name in e
            ]
            cells = [
                f"**{row['name']}**" if row["ours"] else row["name"],
                *(f"{row[q] * 1e3:.3f}" for q in ("p10", "p50", "p90")),
                f"{row['over_floor']:.2f}" if row["over_floor"] else "",
                f"{row['peak_bytes'] / 2**20:.2f}",
                *(f"{e[name]:.1e}" if name in e else "" for name in ERRORS[:2]),
                ", ".join(gradients),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    if absent:
        lines += ["", "Without numbers:", *(f"- {name}: {reason}" for name, reason in absent.items())]
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    families = [f for f in ("logits", "hidden", "epilogue") if any(row["family"] == f for row in rows)]
    figure, axes = pyplot.subplots(len(families), 1, figsize=(9, 3.2 * len(families)), squeeze=False)
    for axis, family in zip(axes[:, 0], families, strict=True):
        shown = [row for row in rows if row["family"] == family][::-1]
        spans = [[(r["p50"] - r["p10"]) * 1e3 for r in shown], [(r["p90"] - r["p50"]) * 1e3 for r in shown]]
        colours = ["tab:orange" if r["ours"] else "tab:grey" for r in shown]
        axis.barh([r["name"] for r in shown], [r["p50"] * 1e3 for r in shown], xerr=spans, color=colours)
        axis.set(title=f"from {family}" if family != "epilogue" else family, xlabel="ms (p10, p50, p90)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def environment(device: torch.device) -> dict[str, str]:
    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "none"

    on_gpu = device.type == "cuda"
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    packages = ["torch", "triton", *sorted({entry.package for entry in ENTRIES if entry.package})]
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU ({platform.machine()})",
        "driver": driver if on_gpu else "none",
        **{name: version(name) for name in packages},
        "commit": output("git", "rev-parse", "--short", "HEAD"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, help="8192; on a CPU 512")
    parser.add_argument("--vocabulary", type=int, help="151936; on a CPU 32000")
    parser.add_argument("--hidden", type=int, help="3584; on a CPU 256")
    parser.add_argument("--tp", type=int, default=1, help="measure one rank's slice, vocabulary / tp; no communication")
    parser.add_argument("--repeats", type=int, help="runs of an entry in a block: 5; on a CPU 1")
    parser.add_argument("--blocks", type=int, default=6, help="blocks, each with all entries, in rotating order")
    parser.add_argument("--only", action="append", metavar="ENTRY", help="only entries of this name; may be repeated")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results", help="folder of kernels.md, .json and .png")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU here; --device cpu runs the benchmark on small shapes, which says nothing about a GPU")

    device = torch.device(options.device)
    defaults = SHAPES[options.device]
    given = (options.tokens, options.vocabulary, options.hidden)
    tokens, vocabulary, width = (g or default for g, default in zip(given, defaults, strict=True))
    if vocabulary % options.tp:
        sys.exit(f"--vocabulary {vocabulary} is not divisible by --tp {options.tp}")
    torch.manual_seed(0)
    x = make_inputs(tokens, vocabulary // options.tp, width, device)
    rows, absent = measure(x, options.repeats or (5 if x.on_gpu else 1), options.blocks, options.only)
    for row in rows:
        row["weight_gradient_bytes"] = x.weight.numel() * 4 + x.weight.numel() * x.weight.element_size()
    summarise(rows)

    about = environment(device)
    shape = {"tokens": tokens, "vocabulary": vocabulary, "hidden": width, "tp": options.tp}
    lines = ["# Kernels", ""] + ([ON_CPU, ""] if device.type == "cpu" else [])
    lines += [", ".join(f"{k} {v}" for k, v in about.items()), "", ", ".join(f"{k} {v}" for k, v in shape.items())]
    lines += [table(rows, absent), "", "Bars:" if x.on_gpu else "Bars that hold on a CPU, too:"]
    judged = []
    for what, value, limit in bars(rows, tokens, width, _tile_bytes(x)):
        if not x.on_gpu and "error" not in what:
            continue
        met = value is not None and value <= limit
        verdict = "not measured" if value is None else "met" if met else f"missed by {_excess(value, limit)}"
        judged.append({"bar": what, "value": value, "limit": limit, "verdict": verdict})
        measured = "" if value is None else f"{value:.3g} of at most {limit:.3g}: "
        lines.append(f"- {what}: {measured}{verdict}")
    text = "\n".join(lines)
    print(text)

    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "kernels.md").write_text(text + "\n")
    everything = {"environment": about, "shape": shape, "rows": rows, "absent": absent, "bars": judged}
    (options.out / "kernels.json").write_text(json.dumps(everything, indent=1) + "\n")
    try:
        plot(rows, options.out / "kernels.png")
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)


def _tile_bytes(x: Inputs) -> int:
    """Of the tiles that linear_logprob works in: float32 logits, and their gradient in bf16."""
    from megarl.ops.tuning import tile

    tokens, columns = x.logits.shape
    forward, backward = (tile(direction, x.logits.device) for direction in ("forward", "backward"))
    of_forward = forward[0] * min(forward[1], columns) * 4
    return max(of_forward, min(backward[0], tokens) * min(backward[1], columns) * 6)


def _excess(value: float, limit: float) -> str:
    return f"{(value / limit - 1) * 100:.0f}%" if limit else f"{value:.3g}"


if __name__ == "__main__":
    main()

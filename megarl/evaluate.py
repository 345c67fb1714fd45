"""megarl eval: avg@k and pass@k of a model on sets of problems; one process and its rollout engines."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from megarl.config import Config
from megarl.data.prompts import PromptSet, load_prompts
from megarl.data.tokenizer import load_tokenizer
from megarl.estimates import Estimate, Interval, estimate, mean_estimate, reported_ks
from megarl.evaluation_folder import EvaluationFolder, Row, check_continues
from megarl.models.family import architecture, read_hf_config
from megarl.models.find_checkpoint import find_checkpoint
from megarl.models.hugging_face import HuggingFaceFiles
from megarl.models.weights import manifest
from megarl.preflight import check_data, check_machine, check_model, check_prompts, check_reward
from megarl.processes import python_command, python_path
from megarl.rollout.sampler import Sampler
from megarl.types import RewardStatus, UserError


def evaluate(config: Config) -> None:
    """Evaluate model.path on data.eval into run.dir, behind what is there already; prints a table."""
    if not config.data.eval:
        raise UserError("data.eval is required: what to evaluate on, e.g. data.eval=arithmetic or data.eval=[math500]")
    config = _with_model(config, find_model(config.model.path))
    check_continues(config)
    check_machine(config)
    problems = check_data(config, "eval")
    check_reward(config, "eval", problems)
    with EvaluationFolder(config) as folder, _hf_folder(config, folder) as model:
        sampling = _sampling_config(config, model)
        check_model(sampling, "eval")
        check_prompts(sampling, "eval", problems)
        tokenizer = load_tokenizer(model)
        prompts = load_prompts(config.data, "eval", tokenizer, problems["eval"])
        folder.open(prompts.prompts, model)
        if len(folder.rows) < len(prompts.prompts):
            _sample(sampling, prompts, tokenizer, folder)
        _report(config, prompts, folder)


def find_model(path: str) -> Path:
    """A Hugging Face folder, local or fetched from the hub, or a checkpoint; the newest where it is a run."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    if folder.is_dir():
        return find_checkpoint(folder)
    if path.count("/") != 1 or path.startswith((".", "~", "/")):
        raise UserError(f"model.path={path} is not a folder; expected a Hugging Face model folder or a checkpoint")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt"])
        )
    except Exception as error:  # the hub client raises dozens of types; all mean that this name can't be had
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"model.path={path}: neither a folder nor a model that could be fetched: {reason}") from None


@contextmanager
def _hf_folder(config: Config, folder: EvaluationFolder) -> Iterator[Path]:
    """The model as a Hugging Face folder; a checkpoint is converted for as long as this lasts, by another process."""
    model = Path(config.model.path)
    if (model / "config.json").is_file():
        yield model
        return
    folder.say(f"converting {model} to the Hugging Face format")
    converted = folder.folder / "converted"
    shutil.rmtree(converted, ignore_errors=True)
    command = python_command("megarl.learner.convert", str(model), str(converted))
    try:
        environment = os.environ | python_path()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, pass_fds=[folder.lock])
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise UserError(f"model.path={model} can't be converted: {reason}")
        yield converted
    finally:
        shutil.rmtree(converted, ignore_errors=True)


def _sample(config: Config, prompts: PromptSet, tokenizer: object, folder: EvaluationFolder) -> None:
    path = config.model.path
    arch = architecture(read_hf_config(path))
    todo, size = prompts.prompts[len(folder.rows) :], config.eval.problems_per_batch

    def weights() -> Iterator[tuple[str, Tensor]]:
        return HuggingFaceFiles(path).tensors(arch)

    with Sampler(config, tokenizer, manifest(arch), folder) as sampler:
        sampler.pool.update_weights(weights(), version=0)
        for start in range(0, len(todo), size):
            with folder.phase("evaluate") as advance:
                folder.append(sampler.pool.run(sampler.evaluate(todo[start : start + size], advance), weights))


def _report(config: Config, prompts: PromptSet, folder: EvaluationFolder) -> None:
    n = config.eval.samples_per_prompt
    found = results(folder.rows, n)
    report = {
        "model": config.model.path,
        "samples_per_prompt": n,
        "temperature": config.eval.temperature,
        "max_response_tokens": config.eval.max_response_tokens or config.rollout.max_response_tokens,
        "prompts_dropped": prompts.dropped,
        "sets": _as_json(found),
    }
    folder.write("eval.json", json.dumps(report, indent=2) + "\n")
    table = Table(title=f"{config.model.path}, {n} samples a problem", title_justify="left")
    table.add_column("set")
    table.add_column("metric")
    for column in ("value", "95%: problems", "95%: samples"):
        table.add_column(column, justify="right")
    for name, (estimates, details) in found.items():
        for i, (metric, estimated) in enumerate(estimates.items()):
            table.add_row(*("" if i else f"{name} ({details['problems']})", metric, *_numbers(estimated)))
        if name != "mean":
            samples = details["problems"] * n
            for status in RewardStatus:
                if details[status] and status != RewardStatus.CORRECT:
                    table.add_row("", status.replace("_", " "), f"{details[status] / samples:.3f}", "", "")
            table.add_row("", "response tokens", f"{details['response_tokens']:.0f}", "", "")
        table.add_section()
    folder.show(table)
    undecided = sum(details.get(status, 0) for _, details in found.values() for status in ("timeout", "error"))
    if undecided:
        folder.say(
            f"{undecided:.0f} samples have no verdict (timeout, error); they count as not right, so avg@{n} could be "
            f"up to {undecided / (len(folder.rows) * n):.3f} higher"
        )
    if prompts.dropped:
        folder.say(f"{prompts.dropped} prompts of over {config.data.max_prompt_tokens} tokens were dropped")
    folder.say(f"every sample: {folder.path}; numbers: {folder.folder / 'eval.json'}")


def results(rows: list[Row], n: int) -> dict[str, tuple[dict[str, Estimate], dict[str, float]]]:
    """Set -> (metric -> estimate, further numbers); behind several sets their `mean`."""
    sets: dict[str, list[Row]] = {}
    for row in rows:
        sets.setdefault(row["set"], []).append(row)
    found = {name: (_estimates(members, n), _details(members)) for name, members in sets.items()}
    if len(found) > 1:
        metrics = next(iter(found.values()))[0]
        means = {metric: mean_estimate([estimates[metric] for estimates, _ in found.values()]) for metric in metrics}
        found["mean"] = (means, {"problems": len(rows)})
    return found


def _as_json(found: dict[str, tuple[dict[str, Estimate], dict[str, float]]]) -> dict[str, Any]:
    return {
        name: {
            **details,
            **{
                metric: {"value": e.value, "over_problems": e.over_problems, "over_samples": e.over_samples}
                for metric, e in estimates.items()
            },
        }
        for name, (estimates, details) in found.items()
    }


def _estimates(rows: list[Row], n: int) -> dict[str, Estimate]:
    correct = [row["correct"] for row in rows]
    return {f"avg@{n}": estimate(correct, n, 1)} | {f"pass@{k}": estimate(correct, n, k) for k in reported_ks(n)}


def _details(rows: list[Row]) -> dict[str, float]:
    samples = [sample for row in rows for sample in row["samples"]]
    statuses = Counter(sample["status"] for sample in samples)
    return {
        "problems": len(rows),
        "response_tokens": sum(sample["tokens"] for sample in samples) / len(samples),
        **{f"{status}": statuses[status] for status in RewardStatus},
    }


def _numbers(estimate: Estimate) -> tuple[str, str, str]:
    def shown(interval: Interval | None) -> str:
        return "{:.3f} - {:.3f}".format(*interval) if interval else "-"

    return f"{estimate.value:.3f}", shown(estimate.over_problems), shown(estimate.over_samples)


def _sampling_config(config: Config, model: Path) -> Config:
    """For the engines, which need room for the evaluation's responses alone."""
    limit = config.eval.max_response_tokens or config.rollout.max_response_tokens
    rollout = config.rollout.model_copy(update={"max_response_tokens": limit})
    return _with_model(config, model).model_copy(update={"rollout": rollout})


def _with_model(config: Config, path: Path) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(path)})})

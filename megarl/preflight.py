"""Everything about a run that can be refused before a rank starts: model, layout, data, run folder."""

from __future__ import annotations

from pathlib import Path

from megarl.config import Config
from megarl.models.family import architecture, read_hf_config
from megarl.types import UserError


def check_run(config: Config, command: str, resume: bool) -> None:
    """Raises UserError, naming the key or row and what would be legal."""
    check_run_folder(config, resume)
    check_precision(config)
    check_model(config)
    check_data(config, command)


def check_run_folder(config: Config, resume: bool) -> None:
    folder = Path(config.run.dir)
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"run.dir={folder}: {path} is a file; name a folder")
    if not resume and (folder / "metrics.jsonl").exists():
        raise UserError(f"run.dir={folder} already holds a run; name another folder, or go on with train --resume")


def check_precision(config: Config) -> None:
    if config.model.precision == "fp8":  # the others run anywhere; this imports Megatron
        from megarl.learner.model import check_precision

        check_precision(config.model.precision)


def check_model(config: Config) -> None:
    from megarl.models.files import HuggingFaceFiles

    path, learner = config.model.path, config.learner
    arch = architecture(read_hf_config(path))
    HuggingFaceFiles(path).check_names(arch, path)
    if not any((Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"model.path={path} has no tokenizer (tokenizer.json); save one with the model")
    arch.check_layout(learner.tensor_model_parallel_size, learner.pipeline_model_parallel_size)
    if config.max_sequence_tokens > arch.max_position_embeddings:
        raise UserError(
            f"data.max_prompt_tokens + rollout.max_response_tokens = {config.max_sequence_tokens} is more than this "
            f"model's {arch.max_position_embeddings} positions; lower one of them"
        )


def check_data(config: Config, command: str) -> None:
    from megarl.data.prompts import load_problems

    problems = load_problems(config.data, "train")
    if config.schedule.prompts_per_step > len(problems):
        raise UserError(
            f"schedule.prompts_per_step={config.schedule.prompts_per_step} is more than the {len(problems)} rows of "
            f"data.train={config.data.train}; use at most that"
        )
    if config.data.eval and command != "sft":
        load_problems(config.data, "eval")

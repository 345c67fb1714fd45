"""avg@k and pass@k of a Hugging Face model on held-out prompts; one process and its rollout engines."""

from __future__ import annotations

import json
import time

from rich.table import Table
from transformers import AutoTokenizer

from megarl.config import Config
from megarl.data.prompts import load_prompts
from megarl.metrics import evaluation_metrics
from megarl.models.family import architecture, read_hf_config
from megarl.models.files import HuggingFaceFiles
from megarl.models.weights import hf_names
from megarl.rollout.sampler import Sampler
from megarl.runlog import RunLog
from megarl.types import UserError


def evaluate(config: Config) -> None:
    """Evaluate model.path on data.eval; writes eval.json and the samples into run.dir and prints a table."""
    if not config.data.eval:
        raise UserError("data.eval is required: what to evaluate on, e.g. data.eval=arithmetic")
    path, started = config.model.path, time.time()
    arch = architecture(read_hf_config(path))
    files = HuggingFaceFiles(path)
    files.check_names(arch, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    with RunLog(config, leads=True) as log:
        prompts = load_prompts(config.data, "eval", tokenizer)
        log.say(
            f"{len(prompts.prompts)} prompts, {prompts.dropped} over {config.data.max_prompt_tokens} tokens dropped"
        )
        with Sampler(config, tokenizer, sorted(hf_names(arch)), log) as sampler:
            sampler.pool.update_weights(files.tensors(arch), version=0)
            groups = sampler.evaluate(prompts.prompts)
        metrics = evaluation_metrics(groups)
        log.samples("eval", groups)
        (log.folder / "eval.json").write_text(json.dumps(metrics, indent=2) + "\n")
        table = Table(title=f"{path} on {config.data.eval}", title_justify="left", show_header=False)
        for name, value in metrics.items():
            table.add_row(name.removeprefix("eval/"), f"{value:.4g}")
        table.add_row("wall time", f"{time.time() - started:.0f} s")
        table.add_row("samples", f"{config.run.dir}/samples/eval.jsonl")
        log.show(table)

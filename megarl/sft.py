"""Supervised fine-tuning: the learner on demonstrations, whose every sequence has advantage 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megarl.algorithms.recipes import SFT
from megarl.batch import build_demonstration_batch
from megarl.config import Config
from megarl.data.problems import Problem, Problems
from megarl.data.prompts import Splits, load_prompts
from megarl.data.templates import frame
from megarl.data.token_counts import TokenCounter
from megarl.data.tokenizer import load_tokenizer
from megarl.learner.learner import Learner
from megarl.learner.mesh import Mesh
from megarl.learner.model import check_precision
from megarl.memory import memory_of_ranks
from megarl.metrics import update_metrics
from megarl.models.family import read_hf_config
from megarl.runlog import RunLog
from megarl.types import UserError


def sft(config: Config, problems: Splits) -> None:
    """Maximise the log-likelihood of data.train's responses; prompts_per_step demonstrations a step. Collective.

    `problems`: rank 0's, which sends each rank its demonstrations of a step.
    """
    check_precision(config.model.precision)
    hf_config = read_hf_config(config.model.path)
    mesh = Mesh(config.learner)
    with RunLog(config, leads=mesh.rank == 0) as log:
        chosen: Demonstrations | None = None
        if mesh.rank == 0:
            chosen = Demonstrations(config, load_tokenizer(config.model.path), problems["train"])
            log.say(f"{mesh.layout}; {chosen}")
        learner = Learner(config, SFT, hf_config, mesh)
        for step in range(config.run.steps):
            batch = build_demonstration_batch(chosen.at_step(step)) if chosen else None
            with log.phase("update"):
                updates = [(share, learner.update(share, step)) for share in learner.updates(learner.deal(batch))]
            metrics = update_metrics(SFT, updates, mesh) | memory_of_ranks(mesh)
            log.step(step + 1, metrics | log.take_times())
        learner.export(Path(config.run.dir) / "hf")
        log.say(f"trained model: {config.run.dir}/hf")
    mesh.close()


class Demonstrations:
    """Prompts with their responses, each tokenised when it is learned from; those over the limits are dropped."""

    def __init__(self, config: Config, tokenizer: Any, problems: Problems | None = None) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._opened = frame(config.data, tokenizer).opened.strip()  # by the prompt: the response goes on behind it
        count, limit = TokenCounter(tokenizer, add_special_tokens=False), config.rollout.max_response_tokens - 1

        def fits(problems: list[Problem]) -> list[bool]:
            return [tokens <= limit for tokens in count([self._response(p.answer) for p in problems], limit)]

        self.prompts = load_prompts(config.data, "train", tokenizer, problems, fits)
        if config.schedule.prompts_per_step > len(self.prompts.prompts):
            raise UserError(
                f"schedule.prompts_per_step={config.schedule.prompts_per_step} is more than the "
                f"{len(self.prompts.prompts)} demonstrations of data.train that fit the token limits; use at most that"
            )

    def at_step(self, step: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Prompt and response ids, with the end of sequence, of a training step."""
        chosen = self.prompts.at_step(step, self._config.schedule.prompts_per_step, self._config.run.seed)
        responses = self._tokenizer([self._response(p.answer) for p in chosen], add_special_tokens=False)["input_ids"]
        end = self._tokenizer.eos_token_id
        return [
            (prompt.token_ids, np.array([*response, end], np.int32))
            for prompt, response in zip(chosen, responses, strict=True)
        ]

    def _response(self, answer: str) -> str:
        return answer.removeprefix(self._opened)

    def __str__(self) -> str:
        return f"{len(self.prompts.prompts)} demonstrations, {self.prompts.dropped} over the token limits dropped"

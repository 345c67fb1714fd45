"""Supervised fine-tuning: the learner on demonstrations, whose every sequence has advantage 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megarl.algorithms.recipes import SFT
from megarl.batch import build_demonstration_batch
from megarl.config import Config
from megarl.data.prompts import PromptSet, encode_prompts, load_problems
from megarl.data.templates import frame
from megarl.data.tokenizer import load_tokenizer
from megarl.learner.learner import Learner
from megarl.learner.mesh import Mesh
from megarl.learner.model import check_precision
from megarl.memory import memory_of_ranks
from megarl.metrics import update_metrics
from megarl.models.family import read_hf_config
from megarl.runlog import RunLog
from megarl.types import Prompt, UserError


def sft(config: Config) -> None:
    """Maximise the log-likelihood of data.train's responses; prompts_per_step demonstrations a step. Collective."""
    check_precision(config.model.precision)
    hf_config = read_hf_config(config.model.path)
    mesh = Mesh(config.learner)
    tokenizer = load_tokenizer(config.model.path)
    with RunLog(config, leads=mesh.rank == 0) as log:
        demonstrations, responses, dropped = load_demonstrations(config, tokenizer)
        log.say(f"{mesh.layout}; {len(demonstrations.prompts)} demonstrations, {dropped} over the token limits dropped")
        learner = Learner(config, SFT, hf_config, mesh)
        for step in range(config.run.steps):
            chosen = demonstrations.at_step(step, config.schedule.prompts_per_step, config.run.seed)
            batch = build_demonstration_batch([(prompt.token_ids, responses[prompt.id]) for prompt in chosen])
            with log.phase("update"):
                updates = [(share, learner.update(share, step)) for share in learner.updates(learner.deal(batch))]
            metrics = update_metrics(SFT, updates, mesh) | memory_of_ranks(mesh)
            log.step(step + 1, metrics | log.take_times())
        learner.export(Path(config.run.dir) / "hf")
        log.say(f"trained model: {config.run.dir}/hf")
    mesh.close()


def load_demonstrations(config: Config, tokenizer: Any) -> tuple[PromptSet, dict[str, np.ndarray], int]:
    """Prompts, the response ids of each prompt id (end-of-sequence added), and how many were over the limits."""
    problems = load_problems(config.data, "train")
    prompt_ids = encode_prompts(config.data, problems, tokenizer)
    opened = frame(config.data, tokenizer).opened.strip()  # by the prompt, so that the response goes on behind it
    answers = [problem.answer.removeprefix(opened) for problem in problems]
    response_ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
    prompts, responses = [], {}
    for problem, prompt, response in zip(problems, prompt_ids, response_ids, strict=True):
        if len(prompt) <= config.data.max_prompt_tokens and len(response) < config.rollout.max_response_tokens:
            source = config.data.train
            prompts.append(Prompt(problem.id, problem.text, np.array(prompt, np.int32), problem.answer, source))
            responses[problem.id] = np.array([*response, tokenizer.eos_token_id], np.int32)
    if config.schedule.prompts_per_step > len(prompts):
        raise UserError(
            f"schedule.prompts_per_step={config.schedule.prompts_per_step} is more than the {len(prompts)} "
            "demonstrations of data.train that fit the token limits; use at most that"
        )
    return PromptSet(prompts, 0), responses, len(problems) - len(prompts)

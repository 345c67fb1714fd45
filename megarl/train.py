"""The training loop; the only file that knows all the parts. Every rank runs it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from megarl.algorithms.credit import credit_groups
from megarl.batch import Kept
from megarl.config import Config
from megarl.data.prompts import Splits
from megarl.data.tokenizer import load_tokenizer
from megarl.learner.agreement import probe_agreement, probe_policy, step_agreement
from megarl.learner.checkpoint import CheckpointStore
from megarl.learner.learner import Learner
from megarl.learner.mesh import Mesh
from megarl.learner.model import check_precision
from megarl.memory import memory_of_ranks
from megarl.metrics import evaluation_metrics, sample_metrics, update_metrics
from megarl.models.family import architecture, read_hf_config
from megarl.models.find_checkpoint import step_of
from megarl.models.weights import manifest
from megarl.rollout.source import RolloutSource
from megarl.runlog import RunLog, summary
from megarl.types import Metrics


def train(config: Config, problems: Splits, resume: bool = False) -> None:
    """Run `config` to its last step on rank 0's problems. Collective. Raises UserError before anything is generated."""
    started = time.time()
    check_precision(config.model.precision)
    hf_config = read_hf_config(config.model.path)
    mesh = Mesh(config.learner)
    store = CheckpointStore(Path(config.run.dir) / "checkpoints", mesh, config.run.keep_checkpoints)
    checkpoint = store.latest() if resume else None
    start = step_of(checkpoint) if checkpoint else 0
    recipe = config.recipe
    if checkpoint and start == config.run.steps:
        _export_again(config, hf_config, mesh, store, checkpoint)
        return

    with (
        RunLog(config, leads=mesh.rank == 0, start=start) as log,
        RolloutSource(
            config,
            mesh,
            problems,
            load_tokenizer(config.model.path),
            manifest(architecture(hf_config)),
            log,
        ) as source,
    ):
        log.say(f"{mesh.layout}; {config.rollout.engines} vLLM engine(s), starting")
        source.claim_memory()
        learner = Learner(config, recipe, hf_config, mesh, temperature=config.rollout.temperature)

        def sync_weights(version: int) -> None:
            with log.phase("weight_sync"):
                source.update_weights(learner.weight_rounds, version)

        def evaluate(done: int) -> Metrics:
            with learner.at_rest():
                groups = source.evaluate(learner.weight_rounds)
            log.samples(f"eval_{done:06d}", groups or [])
            return (evaluation_metrics(groups) if groups else {}) | probe_policy(config, learner, groups)

        evaluations: dict[str, Metrics] = {"before": {}, "after": {}}
        if resume and not checkpoint:
            log.say(f"no checkpoint in {store.folder} yet: starting at the first step")
        if checkpoint:
            log.say(f"resuming from {checkpoint}")
            evaluations = store.load(checkpoint, learner.trainables)["evaluations"]
        sync_weights(start)
        if not checkpoint and config.data.eval:
            evaluations["before"] = evaluate(0)
            log.step(0, evaluations["before"])
        log.take_times()
        done = start

        for step in range(start, config.run.steps):
            with learner.at_rest():
                rollout = source.next_rollout(step, learner.weight_rounds)
            kept = None
            if rollout:
                credit = credit_groups(recipe, rollout.groups, config.rollout.max_response_tokens)
                kept = Kept(rollout.groups, credit)
            with log.phase("scatter"):
                sampled = learner.deal(kept)
            with log.phase("annotate"):
                metrics = probe_agreement(config, learner, rollout)
                learned = learner.annotate(sampled)
            if step == start:
                log.say(f"learner.share_prompts={config.learner.share_prompts}: {sampled.plan.saving}")
            with log.phase("update"):
                updates = [(share, learner.update(share, step)) for share in learner.updates(learned)]
            metrics |= update_metrics(recipe, updates, mesh)
            metrics |= step_agreement(config, mesh, step, sampled, learned, updates)
            if rollout:
                metrics |= sample_metrics(rollout, credit, learned.plan, step)
            done = step + 1
            sync_weights(done)

            last, stop = done == config.run.steps, mesh.broadcast(log.stop_requested)
            if config.data.eval and (last or config.run.is_due(done, config.run.evaluate_every)):
                evaluations["after"] = evaluate(done)
                metrics |= evaluations["after"]
            save = last or stop or config.run.is_due(done, config.run.checkpoint_every)
            if save:
                with log.phase("checkpoint"):
                    state = {"evaluations": evaluations}
                    store.write(done, learner.trainables, config.model.path, state)
            metrics |= memory_of_ranks(mesh, learner.lent_bytes)
            log.step(done, metrics | log.take_times(), rollout)
            if save:
                store.commit(done)  # after the step's record: a resumed run begins behind both
            if stop:
                break

        if done < config.run.steps:
            log.say(f"stopped by {log.stop_file} after step {done}; remove it and go on with --resume")
        else:
            if config.run.export:
                with log.phase("export"):
                    learner.export(log.folder / "hf")
            if mesh.rank == 0:
                samples = log.total("samples/generated")
                log.show(summary(config, evaluations["before"], evaluations["after"], samples, time.time() - started))
    mesh.close()


def _export_again(config: Config, hf_config: Any, mesh: Mesh, store: CheckpointStore, checkpoint: Path) -> None:
    """A run that has all of its steps may have been ended before its export; nothing else is left to do."""
    done = step_of(checkpoint)
    with RunLog(config, leads=mesh.rank == 0, start=done) as log:
        log.say(f"{log.folder} has all of its {done} steps; a higher run.steps goes on")
        if config.run.export:
            learner = Learner(config, config.recipe, hf_config, mesh)
            store.load(checkpoint, learner.trainables)
            learner.export(log.folder / "hf")
            log.say(f"trained model: {log.folder / 'hf'}")
    mesh.close()

"""Whether learner and engines fit their GPUs together, by plain arithmetic: what weights, gradients and moments take.

Activations and what libraries need come on top, so what is refused can't work, and what passes may still be tight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megarl.config import Config
from megarl.memory import GIB
from megarl.models.family import Architecture
from megarl.models.weights import hf_names, hf_shape
from megarl.types import UserError

PROCESS_GIB = 0.5  # that CUDA takes of a GPU for each process on it; a lower bound
KEPT = {"none": 3, "optimizer": 1, "all": 0}  # learner.offload -> the parts that stay, of (weights, gradients, moments)


@dataclass(frozen=True)
class Budget:
    """GiB of one GPU, without activations."""

    total: float
    weights: float  # of the learner, with the reference
    gradients: float
    moments: float  # of Adam and, under lower precision, the weights in float32
    engine: float  # what an engine claims of it
    engine_weights: float
    engines: int  # on this GPU

    @property
    def learner(self) -> float:
        return self.weights + self.gradients + self.moments


def budget(config: Config, arch: Architecture, ranks: int, gpus: int, total: float) -> Budget:
    """Of the fullest GPU, where all `ranks` ranks and the engines share `gpus` GPUs of `total` GiB."""
    learner, rollout, recipe = config.learner, config.rollout, config.recipe
    parameters = sum(math.prod(hf_shape(name, arch)) for name in hf_names(arch))
    of_rank = parameters / learner.model_parallel_size / GIB
    width = 4 if config.model.precision == "fp32" else 2
    trained = 2 if recipe.needs_critic else 1
    frozen = 1 if recipe.needs_reference or config.run.track_kl else 0
    moments = (8 if width == 4 else 12) / learner.data_parallel_size(ranks)
    return Budget(
        total=total,
        weights=of_rank * width * (trained + frozen),
        gradients=of_rank * 4 * trained,
        moments=of_rank * moments * trained,
        engine=rollout.gpu_memory_utilization * total,
        engine_weights=parameters * width / rollout.tensor_parallel_size / GIB,
        engines=math.ceil(rollout.engines * rollout.tensor_parallel_size / gpus),
    )


def check_budget(config: Config, of: Budget) -> None:
    """Raises UserError where colocated engines and learner can't share this GPU; the message does the sum."""
    parts = (of.weights, of.gradients, of.moments)[: KEPT[config.learner.offload]]
    resting = sum(parts) if config.engines_sleep else of.learner
    engines = of.engine * of.engines
    processes = PROCESS_GIB * (1 + of.engines)
    share = f"rollout.gpu_memory_utilization={config.rollout.gpu_memory_utilization:g}"
    if of.engine_weights > of.engine:
        raise UserError(
            f"{share} gives an engine {of.engine:.1f} GiB of a GPU, but its weights alone take "
            f"{of.engine_weights:.1f}; raise it, or rollout.tensor_parallel_size"
        )
    weights = of.engine_weights * of.engines  # which an update finds awake
    if of.learner + weights + processes > of.total:
        raise UserError(
            f"the learner's weights ({of.weights:.1f} GiB), gradients ({of.gradients:.1f}) and moments "
            f"({of.moments:.1f}) and the weights of {of.engines} engine(s) ({weights:.1f}) don't fit a GPU of "
            f"{of.total:.1f} GiB; raise learner.tensor_model_parallel_size or pipeline_model_parallel_size"
        )
    if resting + engines + processes > of.total:
        more = "" if config.learner.offload == "all" or not config.engines_sleep else "learner.offload=all, "
        raise UserError(
            f"{share} for {of.engines} engine(s) takes {engines:.1f} GiB of a GPU of {of.total:.1f} beside the "
            f"learner's {resting:.1f}, and each process {PROCESS_GIB:g}; lower it, or use {more}more ranks to spread "
            "the learner over, or rollout.placement=disaggregated"
        )

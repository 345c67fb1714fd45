"""The configuration of a run: frozen, validated sections, and how they are read from a file and overrides."""

from megarl.config.load import dump_config, load_config, parse_config
from megarl.config.sections import (
    Config,
    DataConfig,
    EvalSet,
    LearnerConfig,
    OptimConfig,
    Precision,
    RewardConfig,
    Section,
)

__all__ = [
    "Config",
    "DataConfig",
    "EvalSet",
    "LearnerConfig",
    "OptimConfig",
    "Precision",
    "RewardConfig",
    "Section",
    "dump_config",
    "load_config",
    "parse_config",
]

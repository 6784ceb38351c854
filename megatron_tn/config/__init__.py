"""The settings of a run: dataclasses, their defaults, and the checks that relate one setting to another.

Hydra composes `conf/` and the command line into a plain mapping; `from_mapping` turns it into a `TrainConfig`. Nothing
deeper in the package ever sees a DictConfig. The dataclasses (run.py, commands.py) are the only place where a default
is written down, and `conf/` holds named departures from them (a model size, an engine, a cluster).

Errors are collected, not raised one at a time: `ConfigError` carries every problem found, one line each, naming the
setting, its value and the relation it breaks.
"""

from megatron_tn.config.commands import (
    LOOP_WARM_UP,
    BenchmarkConfig,
    BenchmarkSettings,
    ConvertConfig,
    EvaluateConfig,
    GenerateConfig,
    ScoreConfig,
)
from megatron_tn.config.mapping import (
    ConfigError,
    differences,
    from_mapping,
    known_keys,
    read_mapping,
    save,
    to_mapping,
    unknown_key,
    unwritable,
)
from megatron_tn.config.run import (
    MOST_SEED,
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    GuardConfig,
    LoggingConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
    WandbConfig,
    load,
)

__all__ = [
    "LOOP_WARM_UP",
    "MOST_SEED",
    "BenchmarkConfig",
    "BenchmarkSettings",
    "CheckpointConfig",
    "ClusterConfig",
    "ConfigError",
    "ConvertConfig",
    "DataConfig",
    "EngineConfig",
    "EvaluateConfig",
    "EvaluationConfig",
    "GenerateConfig",
    "GuardConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "ScheduleConfig",
    "ScoreConfig",
    "TrainConfig",
    "WandbConfig",
    "differences",
    "from_mapping",
    "known_keys",
    "load",
    "read_mapping",
    "save",
    "to_mapping",
    "unknown_key",
    "unwritable",
]

"""The settings of a run: dataclasses with their defaults and bounds, and the relations between settings.

Hydra composes `conf/` and the command line into a plain mapping; `from_mapping` turns it into a `TrainConfig`. No
package gets a DictConfig. Defaults are defined only in the dataclasses (one file per group, commands.py for the other
command lines); the YAML files of `conf/` override them under a name (a model size, an engine, a cluster). Bounds are
annotations of the fields; relations.py has the relations between groups.

`ConfigError` lists all problems, one line each: the setting, its value and the relation it breaks.
"""

from data_pipeline.redaction import has_credentials, redacted, resolved, shown, storable
from megatron_tn.config.bounds import out_of_bounds
from megatron_tn.config.checkpoint import CheckpointConfig
from megatron_tn.config.cluster import ClusterConfig
from megatron_tn.config.commands import (
    LOOP_WARM_UP,
    BenchmarkConfig,
    ConvertConfig,
    EvaluateConfig,
    GenerateConfig,
    PlanConfig,
    ScoreConfig,
)
from megatron_tn.config.data import DataConfig
from megatron_tn.config.engine import EngineConfig
from megatron_tn.config.evaluation import EvaluationConfig
from megatron_tn.config.guard import GuardConfig
from megatron_tn.config.logging import WandbConfig
from megatron_tn.config.mapping import (
    ConfigError,
    changed,
    differences,
    from_mapping,
    from_stored,
    known_keys,
    open_new,
    read_mapping,
    regular,
    replacing,
    save,
    to_mapping,
    to_stored,
    unknown_key,
    unwritable,
)
from megatron_tn.config.model import ModelConfig
from megatron_tn.config.optim import OptimConfig
from megatron_tn.config.parallel import ParallelConfig
from megatron_tn.config.relations import device_problems
from megatron_tn.config.run import TrainConfig, load
from megatron_tn.config.schedule import ScheduleConfig

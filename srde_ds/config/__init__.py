"""The options of a run: one dataclass per section, read from YAML and flags, without side effects."""

from srde_ds.config.data_section import DOMAINS, DataConfig
from srde_ds.config.derive import RunInputs
from srde_ds.config.presets import PRESETS
from srde_ds.config.resolve import resolve
from srde_ds.config.schema import (
    AdapterConfig,
    Config,
    CurriculumConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    SupportConfig,
    TrackingConfig,
    TrainingConfig,
)

__all__ = [
    "AdapterConfig",
    "Config",
    "CurriculumConfig",
    "DOMAINS",
    "DataConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PRESETS",
    "ParallelConfig",
    "RunInputs",
    "SupportConfig",
    "TrackingConfig",
    "TrainingConfig",
    "resolve",
]

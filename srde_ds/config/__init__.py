"""What a run is: one dataclass a section, read from YAML and flags, without side effects."""

from srde_ds.config.resolve import resolve
from srde_ds.config.schema import (
    DOMAINS,
    PRESETS,
    AdapterConfig,
    Config,
    CurriculumConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrackingConfig,
    TrainingConfig,
)

__all__ = [
    "AdapterConfig",
    "Config",
    "CurriculumConfig",
    "DOMAINS",
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PRESETS",
    "ParallelConfig",
    "TrackingConfig",
    "TrainingConfig",
    "resolve",
]

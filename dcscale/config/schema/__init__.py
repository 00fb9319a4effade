"""Every setting of dcscale: one file per group, with a docstring that gives meaning and unit below each field.

YAML files, ``key=value`` on the command line, ``tools/check_config.py --reference`` and the errors of
:mod:`dcscale.config.check` all read these fields and their docstrings. Nothing here imports torch or reads a file, so
that a config can be checked on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dcscale.config.schema.data import DataConfig, DataSource
from dcscale.config.schema.limits import location
from dcscale.config.schema.model import ComposeConfig, ModelConfig, RopeScalingConfig
from dcscale.config.schema.observe import LogConfig, SamplesConfig, ValidationConfig
from dcscale.config.schema.parallel import ParallelConfig
from dcscale.config.schema.train import CheckpointConfig, OptimizerConfig, OptimizerRule, ScheduleConfig, TrainConfig

__all__ = [
    "CHOICES",
    "CheckpointConfig",
    "ComposeConfig",
    "Config",
    "DataConfig",
    "DataSource",
    "LogConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OptimizerRule",
    "ParallelConfig",
    "RopeScalingConfig",
    "RunConfig",
    "SamplesConfig",
    "ScheduleConfig",
    "TrainConfig",
    "ValidationConfig",
]


@dataclass
class RunConfig:
    """The run's name and folder."""

    name: str = "run"
    """Name of the run, shown in TensorBoard; must be usable as a folder name."""

    folder: str = location("runs/${run.name}")
    """Folder that holds everything the run writes: checkpoints, metrics, TensorBoard files."""


@dataclass
class Config:
    """All settings of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

"""Settings: declared in ``schema``, read from YAML files and arguments by ``load``, validated by ``check``."""

from dcscale.config.check import check_config
from dcscale.config.errors import ConfigError, Problem, raise_problems
from dcscale.config.load import Loaded, config_to_dict, differences, from_dict, load_arguments, load_config, to_yaml
from dcscale.config.schema import CheckpointConfig, Config, DataConfig, DataSource, ModelConfig, ParallelConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DataSource",
    "Loaded",
    "ModelConfig",
    "ParallelConfig",
    "Problem",
    "check_config",
    "config_to_dict",
    "differences",
    "from_dict",
    "load_arguments",
    "load_config",
    "raise_problems",
    "to_yaml",
]

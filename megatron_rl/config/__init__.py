"""Configuration: frozen records that name their own mistakes, and YAML files with dotted overrides."""

from megatron_rl.config.credentials import masked, masked_values
from megatron_rl.config.files import load_config, save_config
from megatron_rl.config.record import ConfigError, ConfigRecord
from megatron_rl.config.user_code import USER_CODE, load_user_object

__all__ = [
    "USER_CODE",
    "ConfigError",
    "ConfigRecord",
    "load_config",
    "load_user_object",
    "masked",
    "masked_values",
    "save_config",
]

"""Configuration: frozen records that name their own mistakes, and YAML files with dotted overrides."""

from megatron_rl.config.record import ConfigError, ConfigRecord

__all__ = ["ConfigError", "ConfigRecord"]

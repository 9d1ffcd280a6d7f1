"""The fields of a run, and how unset ones are filled."""

from mocosfl_jax.config.fields import Config, check_types, default_config

__all__ = ["Config", "check_types", "default_config"]

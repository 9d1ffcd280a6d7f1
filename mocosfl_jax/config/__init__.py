"""The fields of a run, and how unset ones are filled."""

from mocosfl_jax.config.fields import Config, Resolved
from mocosfl_jax.config.resolve import resolve
from mocosfl_jax.config.types import check_types, default_config

__all__ = ["Config", "Resolved", "check_types", "default_config", "resolve"]

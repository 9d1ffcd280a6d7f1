"""Configs as JSON: how runs store theirs, read those of earlier versions, and compare them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mocosfl_jax.config.averaging import Averaging
from mocosfl_jax.config.defences import DEFENCES
from mocosfl_jax.config.fields import EXECUTION_FIELDS, METHOD_FIELDS, Config, Resolved
from mocosfl_jax.config.measure import Measure
from mocosfl_jax.config.recipe import find_recipe
from mocosfl_jax.config.rich import Rich
from mocosfl_jax.config.saving import Saving
from mocosfl_jax.config.types import FIELDS, check_types, value_types
from mocosfl_jax.errors import InputError
from mocosfl_jax.models.contract import OPTIONAL_FIELDS

_MEANING_WITHOUT_FIELD = {
    "holdout_fraction": 0.1,
    "client_state": "persistent",
    "cut": 1,
    "bottleneck": "none",
}
"""What a field means in a stored config that lacks it, where that is not today's default. A new
field whose default changes what a run does needs an entry."""

_NEWER_SECTIONS = {
    **DEFENCES,
    "averaging": Averaging,
    "measure": Measure,
    "rich": Rich,
    "saving": Saving,
}

_NEWER_THAN_IDENTITY = {
    "method": "mocosfl",
    "local_epochs": 1,
    "mix_fraction": 1.0,
    "mix_batch_size": None,
    "init_parts": "both",
    "init_digest": None,
    **{
        f"{name}.{field.name}": field.default
        for name, section in _NEWER_SECTIONS.items()
        for field in dataclasses.fields(section)
    },
}
"""Fields that were added after runs got their identity, and what runs without them did."""


def to_json(config: Config) -> dict[str, Any]:
    """Fields and their values, a section as a dict under its name; `config_from_json` reads it."""
    values = {field.name: getattr(config, field.name) for field in FIELDS}
    sections = {name: dataclasses.asdict(section) for name, section in config.sections.items()}
    return {**values, **sections}


def config_from_json(values: Any, where: str) -> Config:
    """The stored config of a run of this version or of an earlier one.

    Args:
      values: fields and their values as JSON has them: tuples have become lists. A field that is
        missing gets the value that stands for what versions without it did.
      where: the file that holds them, which errors name.
    Returns: a `Resolved`, unless values are missing that a resolved config has.
    Raises: InputError: fields that this version does not know, or values of another type.
    """
    if not isinstance(values, dict):
        raise InputError(where, values, "fields and their values are needed")
    defaults = {field.name: field.default for field in FIELDS}
    unknown = sorted(
        name for name in values.keys() - defaults.keys() if not isinstance(values[name], dict)
    )
    if unknown:
        allowed = "fields that this version does not know; a newer one wrote them"
        raise InputError(where, ", ".join(unknown), allowed)
    config = check_types({**defaults, **_MEANING_WITHOUT_FIELD, **values}, f"{where}: config")
    return Resolved.of(config) if _is_complete(config) else config


def _is_complete(config: Config) -> bool:
    """Whether the values are set that every resolved config of its method has."""
    recipe = find_recipe(config.method)
    shared = [
        name
        for name, value_type in value_types(Config).items()
        if not value_type.optional and name not in {"mean", "std", *OPTIONAL_FIELDS, *METHOD_FIELDS}
    ]
    if any(getattr(config, name) is None for name in shared):
        return False
    filled = [name for name, value in recipe.rules(config).items() if value is not None]
    return all(getattr(config, name) is not None for name in recipe.reads.intersection(filled))


def flat_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the name that a command line gives them: `cut`, and `toy.rate` of a section.

    Args: values: fields and sections, from `to_json`.
    """
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{field}": member for field, member in value.items()})
        else:
            flat[name] = value
    return flat


def run_values(config: Config) -> dict[str, Any]:
    """What tells a run from others: the values by name, without those of execution fields.

    A field that was added later is left out where it says what runs did before: the identity of an
    older run stays as it was.
    """
    return {
        name: value
        for name, value in flat_fields(to_json(config)).items()
        if name not in EXECUTION_FIELDS and (name, value) not in _NEWER_THAN_IDENTITY.items()
    }


def differences(stored: Config, found: Config) -> list[str]:
    """Texts like `temperature 0.1 -> 0.2` of the fields, but for execution fields, that differ."""
    old, new = flat_fields(to_json(stored)), flat_fields(to_json(found))
    return [
        f"{name} {old.get(name)!r} -> {new.get(name)!r}"
        for name in old | new
        if name not in EXECUTION_FIELDS and old.get(name) != new.get(name)
    ]

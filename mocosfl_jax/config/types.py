"""From the raw config of a config file to a `Config` whose values have the right types."""

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.core import FrozenDict
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mocosfl_jax.config.fields import Config
from mocosfl_jax.config.recipe import find_recipe
from mocosfl_jax.errors import InputError

FIELDS = tuple(field for field in dataclasses.fields(Config) if field.name != "sections")
"""The fields of `Config` that hold one value each."""

_KINDS = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "True or False",
    tuple: "a tuple",
}
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
"""Sizes between which float32 has its full precision."""


def default_config(method: str = "mocosfl") -> ConfigDict:
    """A locked ConfigDict with every field of `Config` and the sections of a method.

    Unset fields know their type. All fields of a section are unset: they then have the defaults of
    its dataclass, and a method without the section can be chosen instead.

    Args: method: `config.method`.
    Raises: InputError: there is no such method.
    """
    config = ConfigDict()
    for field in FIELDS:
        held = value_types(Config)[field.name].kind
        config[field.name] = placeholder(held) if field.default is None else field.default
    for name, kind in find_recipe(method).sections.items():
        held_by_name = value_types(kind).items()
        config[name] = ConfigDict({field: placeholder(held.kind) for field, held in held_by_name})
    config.method = method
    return config.lock()


def check_types(raw: Mapping[str, Any], where: str = "config") -> Config:
    """The raw config as a `Config` whose unset fields are still None.

    Args:
      raw: a ConfigDict from a config file, or a dict. Sections of the method, and fields of them,
        that are missing here have their defaults.
      where: what errors put before `.FIELD`.
    Raises: InputError: an unknown method, field or section, a value of another type, no value where
    one is needed, an integer beyond int64, or a number too large or too close to 0 for float32.
    """
    method = _typed(f"{where}.method", ValueType(str), raw.get("method"))
    kinds = find_recipe(method, f"{where}.method").sections
    flat = {}
    for name, value in raw.items():
        if name in kinds:
            continue
        if name in value_types(Config) or not isinstance(value, ConfigDict | Mapping):
            flat[name] = value
        elif given := {field: x for field, x in value.items() if x is not None}:
            raise InputError(f"{where}.{name}", given, f"method {method!r} has no such section")
    values = _typed_values(Config, flat, where)
    sections = {
        name: _section(kind, raw.get(name), f"{where}.{name}") for name, kind in kinds.items()
    }
    return Config(**values, sections=FrozenDict(sections))


def _section(kind: type, raw: Any, where: str) -> Any:
    """The section of this dataclass. raw: None: not given.

    Raises: InputError: as `check_types`.
    """
    given = {} if raw is None else raw
    if not isinstance(given, ConfigDict | Mapping):
        names = ", ".join(value_types(kind))
        raise InputError(where, raw, f"a section is needed: values by name, of {names}")
    set_ = {name: value for name, value in given.items() if value is not None}
    defaults = {field.name: field.default for field in _fields(kind)}
    return kind(**_typed_values(kind, {**defaults, **set_}, where))


def _typed_values(kind: type, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of a dataclass's fields by name, without those that are unset.

    Raises: InputError: as `check_types`.
    """
    types = value_types(kind)
    values = {}
    for name, value in raw.items():
        if name not in types:
            allowed = f"no such field; see {kind.__name__} in {kind.__module__}"
            raise InputError(f"{where}.{name}", value, allowed)
        if value is not None:
            values[name] = _typed(f"{where}.{name}", types[name], value)
    for field in _fields(kind):
        if field.default is not None and field.name not in values:
            needed = _KINDS[types[field.name].kind]
            raise InputError(f"{where}.{field.name}", None, f"{needed} is needed")
    return values


class ValueType(NamedTuple):
    """The type of a field's set values, of their members if they are tuples, and whether the type
    allows None too."""

    kind: type
    member: type | None = None
    optional: bool = False


def _fields(kind: type) -> tuple[dataclasses.Field[Any], ...]:
    return FIELDS if kind is Config else dataclasses.fields(kind)


@functools.cache
def value_types(kind: type) -> dict[str, ValueType]:
    """The types of the fields of `Config` or of a section, by name."""
    hints = typing.get_type_hints(kind)
    return {field.name: _value_type(hints[field.name]) for field in _fields(kind)}


def _value_type(hint: Any) -> ValueType:
    optional = type(None) in typing.get_args(hint)
    if optional:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is tuple:
        return ValueType(tuple, typing.get_args(hint)[0], optional)
    return ValueType(hint, None, optional)


def _typed(where: str, value_type: ValueType, value: Any) -> Any:
    """A set value as the type of its field.

    Raises: InputError: it is of another type, or a number that cannot be held.
    """
    kind, member, _ = value_type
    if member is None:
        return _scalar(where, kind, value)
    if type(value) not in (tuple, list):
        raise InputError(where, value, f"a tuple, each member {_KINDS[member]}, is needed")
    return tuple(_scalar(where, member, x) for x in value)


def _scalar(where: str, kind: type, value: Any) -> Any:
    """Raises: InputError: as `_typed`."""
    if type(value) is int and not -(2**63) <= value < 2**63:
        found = f"an integer of {value.bit_length()} bits"  # very long ones cannot be printed
        raise InputError(where, found, "an integer from -2**63 to 2**63 - 1 is needed")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise InputError(where, value, f"{_KINDS[kind]} is needed")
    if isinstance(value, str) and "\0" in value:
        raise InputError(where, value, "a string without null bytes is needed")
    if isinstance(value, float) and value != 0 and not _SMALLEST <= abs(value) <= _LARGEST:
        allowed = f"0 or a finite number of a size from {_SMALLEST:.3g} to {_LARGEST:.3g} is needed"
        raise InputError(where, value, f"{allowed} (float32)")
    return value

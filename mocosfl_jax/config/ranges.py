"""Markers on the fields of a config: which values a field takes, and who reads it.

A field carries its markers in its annotation:

    ema: Annotated[float, FROM_0_BELOW_1, BY_METHOD] = RULE
"""

import enum
import functools
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mocosfl_jax.errors import InputError

LARGEST = 2**31 - 1
"""The largest number that counts something: ids and counters of a run have 32 bits."""


class Marker(enum.Enum):
    """What a field is for.

    EXECUTION: it only says how a run is carried out; a run may be resumed with another value.
    BY_METHOD: not every method reads it. It is unset by default, and setting it is an error if the
      method does not read it.
    """

    EXECUTION = enum.auto()
    BY_METHOD = enum.auto()


EXECUTION, BY_METHOD = Marker.EXECUTION, Marker.BY_METHOD


@dataclass(frozen=True)
class Range:
    """The values that a field takes, beyond what its type says.

    allowed: what is needed, in words. holds: whether a value of the field's type is allowed.
    """

    allowed: str
    holds: Callable[[Any], bool]


def one_of(choices: Iterable[str]) -> Range:
    """One of several names, for example the keys of a table."""
    names = tuple(choices)
    return Range(f"one of {', '.join(names)} is needed", lambda name: name in names)


def at_least(smallest: float, reason: str = "") -> Range:
    """Numbers from `smallest` on. reason: why smaller ones are not allowed, for the error."""
    allowed = f"at least {smallest:g} is needed"
    return Range(f"{allowed}: {reason}" if reason else allowed, lambda x: x >= smallest)


FROM_1 = Range(f"a number from 1 to {LARGEST} is needed", lambda x: 1 <= x <= LARGEST)
FROM_0 = Range(f"a number from 0 to {LARGEST} is needed", lambda x: 0 <= x <= LARGEST)
AT_LEAST_0 = at_least(0)
ABOVE_0 = Range("a number above 0 is needed", lambda x: x > 0)
ABOVE_0_TO_1 = Range("a number in (0, 1] is needed", lambda x: 0 < x <= 1)
FROM_0_BELOW_1 = Range("a number in [0, 1) is needed", lambda x: 0 <= x < 1)


def check_ranges(config: Any, prefix: str = "config.") -> None:
    """Checks every set field by itself.

    Args:
      config: a dataclass whose fields may carry ranges; None means unset.
      prefix: what errors put before the name of a field.
    Raises: InputError: names the first field with a value that is not allowed.
    """
    kind: type = type(config)
    for name, markers in markers_of(kind).items():
        value = getattr(config, name)
        for marker in markers:
            if isinstance(marker, Range) and value is not None and not marker.holds(value):
                raise InputError(f"{prefix}{name}", value, marker.allowed)


def marked(kind: type, marker: Marker) -> frozenset[str]:
    """Names of the fields of a dataclass that carry a marker."""
    return frozenset(name for name, markers in markers_of(kind).items() if marker in markers)


@functools.cache
def markers_of(kind: type) -> Mapping[str, tuple[Any, ...]]:
    """The markers of each field of a dataclass, in their order."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}

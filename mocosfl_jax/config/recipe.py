"""What a method tells the config, and how a method is found by its name."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from flax.core import FrozenDict

from mocosfl_jax.config.fields import METHOD_FIELDS, Config, Resolved
from mocosfl_jax.data.dataset import DatasetInfo
from mocosfl_jax.data.partition import ClientImages
from mocosfl_jax.errors import InputError
from mocosfl_jax.federated.axes import Axes
from mocosfl_jax.federated.contract import Method
from mocosfl_jax.federated.state import TrainState

BUILT_IN = {
    "mocosfl": "mocosfl_jax.methods.mocosfl.recipe:MOCOSFL",
    "local": "mocosfl_jax.methods.local.recipe:LOCAL",
}
"""Where the recipe of each built-in method is."""


@dataclass(frozen=True)
class FormerLayout:
    """The state as checkpoints of an earlier version hold it; both functions only move leaves.

    to_former: from a `TrainState` to the pytree of that version. from_former: back, into the form
      of a given state.
    """

    to_former: Callable[[TrainState], Any]
    from_former: Callable[[Any, TrainState], TrainState]


class Facts(NamedTuple):
    """What a method says of a run that follows from its config.

    values: by their name in summary.json; numbers and texts. notes: lines for a person, after the
      plan of `--dry_run` and the table at the end.
    """

    values: Mapping[str, Any] = FrozenDict()
    notes: tuple[str, ...] = ()

    def with_others(self, others: "Facts") -> "Facts":
        return Facts({**self.values, **others.values}, (*self.notes, *others.notes))


@dataclass(frozen=True)
class Recipe:
    """What a method tells the config: the fields it reads, its rules and checks, how it is built.

    reads: names of BY_METHOD fields; setting one that is not among them is an error.
    build: from config, mesh axes and number of devices to the method.
    rules: values of the fields that it reads, where they are unset. The fields that all methods
      share are filled already; values of other fields than those in `reads` are ignored.
    check: raises InputError for values that contradict each other, or the data set.
    check_holdings: raises InputError where clients hold too few images for the method.
    sections: by name, frozen dataclasses whose fields have defaults, and ranges like those of
      `Config`; they become `config.NAME.FIELD`.
    rate_by_round: whether learning rates change between rounds only, and not within one.
    facts: what it says of a run. Its second argument counts how often the most often drawn image
      is drawn, which takes a while.
    memory_hints: by part of the state (`population`, `cohort`, or `server.X` and `cohort.X` for the
      field X of these), the config field to blame where it does not fit the device, and what to do.
    former: how checkpoints of version 0.1 held this method's state; None: they never did.
    """

    reads: frozenset[str]
    build: Callable[[Resolved, Axes, int], Method]
    rules: Callable[[Config], Mapping[str, Any]] = lambda config: {}
    check: Callable[[Resolved, DatasetInfo], None] = lambda config, info: None
    check_holdings: Callable[[Resolved, ClientImages], None] = lambda config, partition: None
    sections: Mapping[str, type] = FrozenDict()
    rate_by_round: bool = False
    facts: Callable[[Resolved, Callable[[], int]], Facts] = lambda config, most_draws: Facts()
    memory_hints: Mapping[str, tuple[str, str]] = FrozenDict()
    former: FormerLayout | None = None

    def __post_init__(self) -> None:
        """Raises: ValueError: a name that cannot be used."""
        if unknown := self.reads - METHOD_FIELDS:
            raise ValueError(f"reads {sorted(unknown)}, which are no fields marked BY_METHOD")
        names = {field.name for field in dataclasses.fields(Config)}
        if taken := names.intersection(self.sections):
            raise ValueError(f"sections {sorted(taken)} have the names of fields")
        for name, kind in self.sections.items():
            for field in dataclasses.fields(kind):
                if field.default is dataclasses.MISSING:
                    raise ValueError(f"field {field.name} of section {name} has no default")


def find_recipe(name: str, where: str = "config.method") -> Recipe:
    """The recipe of a method.

    Args:
      name: of a built-in method, or `package.module:NAME`.
      where: what errors name.
    Raises: InputError: an unknown name, a module that cannot be imported, or no recipe in it.
    """
    module, _, attribute = BUILT_IN.get(name, name).partition(":")
    if not module or not attribute:
        allowed = f"one of {', '.join(BUILT_IN)}, or package.module:NAME, is needed"
        raise InputError(where, name, allowed)
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module is code, and may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")
        raise InputError(where, name, f"the module cannot be imported: {reason}") from error
    if not isinstance(found, Recipe):
        raise InputError(where, name, f"{module} has no Recipe of the name {attribute}")
    return found

"""The options of the command: which protocols, on which data."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mocosfl_jax.config.ranges import FROM_0_BELOW_1, check_ranges
from mocosfl_jax.errors import InputError
from mocosfl_jax.evaluation.protocols import PROTOCOLS
from mocosfl_jax.run.options import check_name, define_options, options_of, parse_options


@dataclass(frozen=True)
class Options:
    """What is evaluated; the command line has a flag of the same name for each.

    Raises: InputError: a value that is not allowed, under the name of its flag.
    """

    # Protocols, with commas between them.
    protocols: str = ",".join(PROTOCOLS)
    # Another data set, written as `config.dataset` is. None: the run's own.
    dataset: str | None = None
    # How that data set is read: the fields of a config of the same names.
    train_split: str | None = None
    test_split: str | None = None
    holdout_fraction: Annotated[float | None, FROM_0_BELOW_1] = None
    # What its numbers are called: transfer/NAME/knn_top1. None: after the data set.
    name: str | None = None
    # Where TFDS data sets lie. None: where the run found its own.
    data_dir: str | None = None

    def __post_init__(self) -> None:
        check_ranges(self, "--")
        for protocol in self.chosen:
            if protocol not in PROTOCOLS:
                allowed = f"one or more of {','.join(PROTOCOLS)} are needed"
                raise InputError("--protocols", protocol, allowed)
        if self.dataset is not None:
            check_name(self.transfer)
            return
        for flag in ("train_split", "test_split", "holdout_fraction", "name"):
            if getattr(self, flag) is not None:
                allowed = "--dataset is not given: the run's own data are read as in training"
                raise InputError(f"--{flag}", getattr(self, flag), allowed)

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of the protocols, each once, in the order in which they were given."""
        return tuple(dict.fromkeys(name.strip() for name in self.protocols.split(",")))

    @property
    def transfer(self) -> str:
        """What numbers on the other data set are called: `cifar100`, or the end of a path."""
        dataset = self.dataset or ""
        scheme, _, path = dataset.partition(":")
        last = {"folder": Path(path).name, "npz": Path(path).stem}.get(scheme, dataset)
        return self.name or re.sub(r"[^\w.+=-]+", "-", last, flags=re.ASCII)


def transfer_of(arguments: Sequence[str]) -> str | None:
    """What the numbers of a transfer are called: `transfer/NAME`; None: the run's own are made.

    Args: arguments: of the command, without --workdir.
    Raises: InputError: it would be refused, whatever the run is.
    """
    values = define_options(Options)
    parse_options(values, ["evaluate", "--workdir=.", *arguments])
    options = options_of(values, Options)
    return None if options.dataset is None else f"transfer/{options.transfer}"

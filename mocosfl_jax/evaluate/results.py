"""Where the numbers of an evaluation go.

Those of a finished run's last network go into its summary.json. All others go into evaluation.json,
which says of which step they are: a run without a summary is not finished.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from mocosfl_jax.errors import InputError
from mocosfl_jax.run.storage import read_json, write_json
from mocosfl_jax.run.summary import by_transfer, read_summary
from mocosfl_jax.run.workdir import hold


class Network(NamedTuple):
    """What tells a network from others. run: digest of its run's identity. step: of its training.
    encoder: digest of its weights."""

    run: str
    step: int
    encoder: str | None


class ResultsFile:
    """The numbers of a network in its run's folder.

    A finished run's folder is held meanwhile, so that two commands do not lose each other's
    numbers; one that trains is left alone. finished: whether the run is. path: of the file.

    Raises: InputError: a file that cannot be read, or a finished run's folder that is in use.
    """

    def __init__(self, workdir: Path, network: Network):
        self._network = network
        summary = workdir / "summary.json"
        self.finished = summary.exists() and _is_of(read_summary(summary), network)
        self.path = summary if self.finished else workdir / "evaluation.json"
        _ = self._stored()  # which raises
        self._lock: TextIO | None = hold(workdir) if self.finished else None

    def check_transfer(self, name: str, data: str) -> None:
        """Raises: InputError: numbers of other data have this name.

        Args: data: digest of the data set.
        """
        before = by_transfer(self._stored()).get(name, {})
        if before.get("data", data) != data:
            found = f"{self.path.name} has numbers of {before.get('dataset')!r} under it"
            raise InputError(
                "--name", name, f"{found}, of other images or other splits: another name is needed"
            )

    def add(self, numbers: Mapping[str, Any]) -> None:
        """Replaces the file at once, with these numbers beside or in place of those in it.

        Raises: InputError: it can no longer be read. StorageError.
        """
        write_json(self.path, {**self._stored(), **numbers})

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def _stored(self) -> dict[str, Any]:
        """What the file says of this network."""
        if self.finished:
            return read_summary(self.path)
        stored = read_json(self.path) if self.path.exists() else {}
        mine = self._network._asdict()
        same = all(stored.get(name) == value for name, value in mine.items())
        return stored if same else mine


def _is_of(summary: dict[str, Any], network: Network) -> bool:
    """Whether a summary is about this very network; version 0.1.0 did not store its digests."""
    return (
        summary["steps"] == network.step
        and summary.get("run", network.run) == network.run
        and summary.get("encoder") in (None, network.encoder)
    )

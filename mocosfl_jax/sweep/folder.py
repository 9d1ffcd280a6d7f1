"""The files of a sweep: DIR/sweep.json, DIR/runs/NAME, DIR/report.*."""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ml_collections import ConfigDict

from mocosfl_jax.config.fields import EXECUTION_FIELDS, Config
from mocosfl_jax.errors import InputError
from mocosfl_jax.run.storage import read_json, write_json
from mocosfl_jax.run.workdir import hold
from mocosfl_jax.sweep.definition import Run


@dataclass(frozen=True)
class Record:
    """One run of a sweep as the report sees it."""

    name: str
    method: str  # "" where the sweep has no variants
    cell: dict[str, Any]  # its values of the grid's fields
    config: dict[str, Any]  # all of its fields
    summary: dict[str, Any] | None  # its summary.json; None: unfinished
    last_words: str  # last line of its log


class SweepFolder:
    """A sweep's folder; `hold` makes it this process's own, reading needs no lock."""

    def __init__(self, path: str | Path):
        self.path = Path(os.path.expanduser(path)).absolute()
        self.definition_path = self.path / "sweep.json"
        self.slurm_path = self.path / "slurm"

    def hold(self) -> TextIO:
        """Raises: InputError: the folder cannot be written, or another process runs the sweep."""
        return hold(self.path)

    def run_path(self, name: str) -> Path:
        return self.path / "runs" / name

    def log_path(self, name: str) -> Path:
        return self.run_path(name) / "log.txt"

    def is_finished(self, name: str) -> bool:
        return self._summary_path(name).exists()

    def claim(
        self, sweep: ConfigDict, runs: Mapping[str, Run], configs: Mapping[str, Config]
    ) -> list[str]:
        """Writes the definition, in place of the one that lies here.

        Returns: unfinished runs that lie here and are left out now.
        Raises: InputError: a run that lies here is finished and left out, or has another config.
        """
        definition = json.loads(
            json.dumps(
                {
                    "columns": sweep.columns,
                    "metrics": sweep.metrics,
                    "runs": {name: _described(run, configs[name]) for name, run in runs.items()},
                }
            )
        )
        stored = read_json(self.definition_path)["runs"] if self.definition_path.exists() else {}
        left_out = self._check_keeps(stored, definition["runs"])
        write_json(self.definition_path, definition)
        return left_out

    def definition(self) -> dict[str, Any]:
        """Columns, metrics and runs of the sweep that lies here.

        Raises: InputError: none does.
        """
        if not self.definition_path.exists():
            raise InputError("--workdir", str(self.path), "no sweep lies here")
        return read_json(self.definition_path)

    def records(self) -> list[Record]:
        """All runs of the sweep that lies here.

        Raises: InputError: none does.
        """
        return [
            Record(
                name=name,
                summary=self._summary(name),
                last_words=last_line(self.log_path(name)),
                **run,
            )
            for name, run in self.definition()["runs"].items()
        ]

    def _summary_path(self, name: str) -> Path:
        return self.run_path(name) / "summary.json"

    def _summary(self, name: str) -> dict[str, Any] | None:
        return read_json(self._summary_path(name)) if self.is_finished(name) else None

    def _check_keeps(self, stored: dict[str, Any], runs: dict[str, Any]) -> list[str]:
        left_out = [name for name in stored if name not in runs]
        for name in left_out:
            if self.is_finished(name):
                allowed = f"holds a finished run that this sweep would leave out: {name}"
                raise InputError("--workdir", str(self.path), allowed)
        for name in [name for name in stored if name in runs]:
            old, new = stored[name]["config"], runs[name]["config"]
            for field in sorted(old.keys() - EXECUTION_FIELDS):
                if field == "holdout_fraction" and new.get(field) is None:
                    continue  # a rule now; a run that lies here keeps its own
                if old[field] != new.get(field):
                    change = f"{field} {old[field]!r} -> {new.get(field)!r}"
                    allowed = f"holds a sweep with another config ({change}, run {name})"
                    raise InputError("--workdir", str(self.path), allowed)
        return left_out


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def _described(run: Run, config: Config) -> dict[str, Any]:
    return {"method": run.method, "cell": run.cell, "config": dataclasses.asdict(config)}

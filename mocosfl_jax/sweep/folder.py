"""The files of a sweep: DIR/sweep.json, DIR/runs/NAME, DIR/report.*."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ml_collections import ConfigDict

from mocosfl_jax.config import Config
from mocosfl_jax.config.stored import config_from_json, differences, flat_fields, to_json
from mocosfl_jax.errors import InputError
from mocosfl_jax.run.storage import read_json, write_json
from mocosfl_jax.run.workdir import hold
from mocosfl_jax.sweep.definition import Fields, Run

_FORMER_DEFAULTS = {
    "holdout_fraction": 0.1,
    "cut": 1,
    "bottleneck": "none",
    "client_state": "persistent",
    "feature_sharing": True,
    "queue_length": 6000,
    "temperature": 0.1,
    "ema": 0.99,
    "align_momentum": False,
}
"""Defaults that older definitions store for fields that are now unset and filled by a rule."""


@dataclass(frozen=True)
class Record:
    """One run of a sweep as the report sees it."""

    name: str
    variant: str  # "" if the sweep has no variants
    cell: Fields  # its values of the grid's fields
    config: Fields  # all of its fields, None where unset
    summary: dict[str, Any] | None  # its summary.json; None: unfinished
    last_words: str  # last line of its log


class SweepFolder:
    """A sweep's folder; `hold` locks it for writing, reading needs no lock."""

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
        """Writes the sweep's definition, which replaces the one in the folder.

        Args: runs: from `expand`. configs: of the runs by name, from `check`.
        Returns: unfinished runs in the folder that the sweep no longer has.
        Raises: InputError: a finished run in the folder that the sweep no longer has, or a run that
        has another config there.
        """
        stored = self.definition()["runs"] if self.definition_path.exists() else {}
        left_out = [name for name in stored if name not in runs]
        for name in filter(self.is_finished, left_out):
            allowed = f"holds a finished run that this sweep would leave out: {name}"
            raise InputError("--workdir", str(self.path), allowed)
        for name in [name for name in stored if name in runs]:
            self._check_config(name, stored[name]["config"], configs[name])
        definition = {
            "columns": sweep.columns,
            "metrics": sweep.metrics,
            "runs": {
                name: {"variant": run.variant, "cell": run.cell, "config": to_json(configs[name])}
                for name, run in runs.items()
            },
        }
        write_json(self.definition_path, definition)
        return left_out

    def definition(self) -> dict[str, Any]:
        """Columns, metrics and runs of the sweep in the folder.

        Raises: InputError: there is none.
        """
        if not self.definition_path.exists():
            raise InputError("--workdir", str(self.path), "no sweep lies here")
        return read_json(self.definition_path)

    def records(self) -> list[Record]:
        """All runs of the sweep in the folder.

        Raises: InputError: there is none.
        """
        return [
            Record(
                name=name,
                variant=run["variant"] if "variant" in run else run["method"],  # its former name
                cell=run["cell"],
                config=flat_fields(run["config"]),
                summary=read_json(self._summary_path(name)) if self.is_finished(name) else None,
                last_words=last_line(self.log_path(name)),
            )
            for name, run in self.definition()["runs"].items()
        ]

    def _summary_path(self, name: str) -> Path:
        return self.run_path(name) / "summary.json"

    def _check_config(self, name: str, stored: dict[str, Any], config: Config) -> None:
        """Raises: InputError: the sweep gives a stored run another config.

        A field that is set now but was unset must have the value that its rule gave the run.
        """
        values = dict(stored)
        if "method" not in stored:
            for field, default in _FORMER_DEFAULTS.items():
                if getattr(config, field) is None and values.get(field, default) == default:
                    values[field] = None
        old = config_from_json(values, f"{self.definition_path}: {name}")
        path = self.run_path(name) / "config.json"
        if path.exists():
            filled: dict[str, Any] = {
                field: value
                for field, value in vars(config_from_json(read_json(path), str(path))).items()
                if getattr(old, field) is None and getattr(config, field) is not None
            }
            old = dataclasses.replace(old, **filled)
        if changes := differences(old, config):
            allowed = f"holds a sweep with another config ({changes[0]}, run {name})"
            raise InputError("--workdir", str(self.path), allowed)


def last_line(log: Path) -> str:
    """The last line of a log that is not blank."""
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"

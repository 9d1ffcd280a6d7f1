"""The files of a sweep: DIR/sweep.json, DIR/runs/NAME, DIR/report.*.

RUN/commands.json lists the commands that have ended well after the training of the run.
"""

import dataclasses
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ml_collections import ConfigDict

from mocosfl_jax.config import Config
from mocosfl_jax.config.stored import config_from_json, differences, flat_fields, to_json
from mocosfl_jax.errors import InputError
from mocosfl_jax.run.storage import read_json, write_json
from mocosfl_jax.run.summary import MADE_AGAIN
from mocosfl_jax.run.workdir import CONFIG_FILE, SWEEP_FILE, hold
from mocosfl_jax.sweep.checks import Fields
from mocosfl_jax.sweep.definition import Run, columns_of

_FORMER_DEFAULTS_OF_0_1 = {
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
"""Defaults that definitions of version 0.1.0, which lack the field `method`, store for fields that
are now unset and filled by a rule."""

_FORMER_DEFAULTS = {"width": 64}
"""The same, in definitions of that version and of later ones."""


_SAME_RUN = {"run": "run", "step": "steps"}
"""Fields of an attack's report and of a run's summary that agree if the attack was on its end."""


@dataclass(frozen=True)
class Record:
    """One run of a sweep as the report sees it."""

    name: str
    variant: str  # "" if the sweep has no variants
    cell: Fields  # its values of the grid's fields
    config: Fields  # all of its fields, None where unset
    finished: bool  # whether its training and all of its commands have ended well
    summary: dict[str, Any] | None  # its summary.json; None: it is not trained yet
    attacks: dict[str, Any]  # what attacks on the trained run say, by `attack/NAME/` and the field
    last_words: str  # last line of its log

    @property
    def numbers(self) -> dict[str, Any]:
        """What is reported of the trained run, by its name in `number_of`."""
        return {**(self.summary or {}), **self.attacks}


class SweepFolder:
    """A sweep's folder; `hold` locks it for writing, reading needs no lock."""

    def __init__(self, path: str | Path):
        self.path = Path(os.path.expanduser(path)).absolute()
        self.definition_path = self.path / SWEEP_FILE
        self.slurm_path = self.path / "slurm"

    def check_place(self) -> None:
        """Raises: InputError: it is the folder of a run."""
        if (self.path / CONFIG_FILE).exists():
            allowed = "a run lies here: another folder is needed"
            raise InputError("--workdir", str(self.path), allowed)

    def hold(self) -> TextIO:
        """Raises: InputError: the folder cannot be written, or another process runs the sweep."""
        return hold(self.path)

    def run_path(self, name: str) -> Path:
        return self.path / "runs" / name

    def log_path(self, name: str) -> Path:
        return self.run_path(name) / "log.txt"

    def is_finished(self, name: str, commands: Collection[str] = ()) -> bool:
        """Whether the run is trained, and these of its commands have ended well.

        A run whose summary is damaged is not: training it again says what to do.
        """
        trained = isinstance(self._summary(name), dict)
        return trained and not self.commands_left(name, commands)

    def commands_left(self, name: str, commands: Collection[str]) -> list[str]:
        """Those that have not ended well yet, in their order."""
        ended = self._ended(name)
        return [command for command in commands if command not in ended]

    def stored_config(self, name: str) -> Config | None:
        """Of a run that has begun.

        Raises: InputError: a file that cannot be read.
        """
        path = self.run_path(name) / CONFIG_FILE
        return config_from_json(read_json(path), str(path)) if path.exists() else None

    def record_command(self, name: str, command: str) -> None:
        """Notes that a command has ended well. Raises: StorageError."""
        ended = [*self._ended(name), command]
        noted = {"encoder": self._encoder(name), "ended_well": ended}
        write_json(self._commands_path(name), noted)

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
        left_out = self._check_left_out(stored, runs)
        for name in [name for name in stored if name in runs]:
            self._check_config(name, stored[name]["config"], configs[name])
        definition = {
            "columns": columns_of(sweep),
            "metrics": sweep.metrics,
            "scatter": sweep.scatter,
            "runs": {name: _described(run, configs[name]) for name, run in runs.items()},
        }
        write_json(self.definition_path, definition)
        return left_out

    def definition(self) -> dict[str, Any]:
        """The runs of the sweep in the folder, and what of it is reported.

        Raises: InputError: there is none.
        """
        if not self.definition_path.exists():
            raise InputError("--workdir", str(self.path), "no sweep lies here")
        return read_json(self.definition_path)

    def records(self) -> list[Record]:
        """All runs of the sweep in the folder.

        Raises: InputError: there is none.
        """
        return [self._record(name, run) for name, run in self.definition()["runs"].items()]

    def _record(self, name: str, run: dict[str, Any]) -> Record:
        """Args: run: what the definition says of it."""
        summary = self._summary(name)
        damage = str(summary) if isinstance(summary, InputError) else None
        summary = None if isinstance(summary, InputError) else summary
        return Record(
            name=name,
            variant=run["variant"] if "variant" in run else run["method"],  # its former name
            cell=run["cell"],
            config=flat_fields(run["config"]),
            finished=self.is_finished(name, run.get("commands", ())),
            summary=summary,
            attacks={} if summary is None else self._attacks(name, summary),
            last_words=damage or last_line(self.log_path(name)),
        )

    def _summary_path(self, name: str) -> Path:
        return self.run_path(name) / "summary.json"

    def _summary(self, name: str) -> dict[str, Any] | InputError | None:
        """Of a trained run; None: it is not trained; or what is wrong with the file."""
        path = self._summary_path(name)
        try:
            return read_json(path, MADE_AGAIN) if path.exists() else None
        except InputError as error:
            return error

    def _attacks(self, name: str, summary: dict[str, Any]) -> dict[str, Any]:
        """Those on the trained run. Raises: InputError: a file that is no JSON."""
        reports = {
            path.parent.name: read_json(path)
            for path in sorted(self.run_path(name).glob("attack/*/attack.json"))
        }
        return {
            f"attack/{attack}/{field}": value
            for attack, report in reports.items()
            if all(report.get(ours) == summary.get(its) for ours, its in _SAME_RUN.items())
            for field, value in flat_fields(report).items()
        }

    def _commands_path(self, name: str) -> Path:
        return self.run_path(name) / "commands.json"

    def _ended(self, name: str) -> list[str]:
        """None if the run has been trained anew since then, and has come out otherwise."""
        path = self._commands_path(name)
        noted = read_json(path) if path.exists() else {}
        same = noted.get("encoder") == self._encoder(name)
        return noted.get("ended_well", []) if same else []

    def _encoder(self, name: str) -> str | None:
        """Digest of the run's encoder."""
        summary = self._summary(name)
        return summary.get("encoder") if isinstance(summary, dict) else None

    def _check_left_out(self, stored: Collection[str], runs: Collection[str]) -> list[str]:
        """The stored runs that the sweep no longer has; raises InputError if one is finished."""
        left_out = [name for name in stored if name not in runs]
        for name in left_out:
            if self.is_finished(name):
                allowed = f"holds a finished run that this sweep would leave out: {name}"
                raise InputError("--workdir", str(self.path), allowed)
        return left_out

    def _check_config(self, name: str, stored: dict[str, Any], config: Config) -> None:
        """Raises: InputError: the sweep gives a stored run another config.

        A field that is set now but was unset must have the value that its rule gave the run.
        """
        values = dict(stored)
        former = _FORMER_DEFAULTS_OF_0_1 if "method" not in stored else {}
        for field, default in (former | _FORMER_DEFAULTS).items():
            if getattr(config, field) is None and values.get(field, default) == default:
                values[field] = None
        old = config_from_json(values, f"{self.definition_path}: {name}")
        begun = self.stored_config(name)
        if begun is not None:
            filled: dict[str, Any] = {
                field: value
                for field, value in vars(begun).items()
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


def _described(run: Run, config: Config) -> dict[str, Any]:
    """A run as sweep.json has it."""
    return {
        "variant": run.variant,
        "cell": run.cell,
        "config": to_json(config),
        "commands": run.commands,
    }

"""The folder of a run: what lies where, whose it is, and what a restart must agree with."""

import dataclasses
import fcntl
import functools
import itertools
import os
import secrets
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from mocosfl_jax.config import Config, Resolved
from mocosfl_jax.config.data import prepare
from mocosfl_jax.config.stored import config_from_json, differences, to_json
from mocosfl_jax.data.dataset import DatasetInfo, Prepared
from mocosfl_jax.data.fingerprint import difference
from mocosfl_jax.errors import InputError
from mocosfl_jax.run.checkpoint import has_unfinished, saved_steps
from mocosfl_jax.run.storage import (
    StorageError,
    out_of_room,
    read_json,
    reason,
    write_json,
    writing,
)

CONFIG_FILE, SWEEP_FILE = "config.json", "sweep.json"
"""What makes a folder that of a run, or of a sweep."""

_PUT_BACK = "put an intact one back, or move the folder away"


class Stored(NamedTuple):
    """What a run's folder says of it.

    config: resolved. data: fingerprint of its data set; None in a folder of version 0.1.0.
    """

    config: Config
    data: dict[str, Any] | None


class WorkDir:
    """A run's folder, held by one run at a time; of its processes the primary one writes.

    Raises: InputError: the folder cannot be written, or is in use by a running process.
    """

    def __init__(self, path: str | Path, primary: bool = True):
        self.primary = primary
        self.path = Path(path).absolute()
        self.config_path = self.path / CONFIG_FILE
        self.data_path = self.path / "dataset.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.summary_path = self.path / "summary.json"
        self.encoder_path = self.path / "encoder.safetensors"
        self.checkpoints_path = self.path / "checkpoints"
        self.tensorboard_path = self.path / "tensorboard"
        self._lock = hold(self.path) if primary else None

    def claim(self, config: Resolved, info: DatasetInfo) -> Resolved:
        """Checks that the folder is free or holds this very run; changes nothing.

        Args: config: resolved, but for mean and std. info: of its data set.
        Returns: the config, with mean and std of the run that lies here where they are unset.
        Raises: InputError: another config or data set, or files that cannot be read.
        """
        _check_files(self)
        stored = self.stored
        if stored is None:
            return config
        moved = stored.config.dataset != config.dataset
        if stored.data is not None:
            if change := difference(stored.data, info.fingerprint):
                allowed = f"the run in {self.path} was started on other data: {change}"
                raise InputError("config.dataset", config.dataset, allowed)
            config = with_stored_stats(config, stored.config)
        elif moved and _kind(stored.config.dataset) != _kind(config.dataset):
            raise self._another([f"dataset {stored.config.dataset!r} -> {config.dataset!r}"])
        self.check_same(config)
        return config

    @functools.cached_property
    def stored(self) -> Stored | None:
        """What lies here; None: no run.

        Raises: InputError: files that cannot be read.
        """
        return read_stored(self.path)

    def record(self, config: Resolved, info: DatasetInfo) -> None:
        """Writes the config, complete, and the data set's fingerprint.

        Raises: StorageError.
        """
        now = Stored(config, info.fingerprint)
        if self.primary and now != self.stored:
            names = list(info.class_names) if info.class_names else None
            write_json(self.data_path, {"class_names": names, "fingerprint": info.fingerprint})
            write_json(self.config_path, to_json(config))
        self.stored = now

    def mark(self) -> None:
        """Writes what only processes that see this very folder can read."""
        if self._lock is not None:
            with writing(self.path):
                self._lock.write(secrets.token_hex(8))
                self._lock.flush()
                os.fsync(self._lock.fileno())

    def read_mark(self) -> str:
        """What `mark` wrote on the primary process, once that is done."""
        path = self.path / ".lock"
        return path.read_text() if path.exists() else "no such folder"

    def set_aside(self, paths: Iterable[Path]) -> None:
        """Renames files or folders of the run into DIR/set_aside, under names that are free.

        Raises: StorageError.
        """
        target = self.path / "set_aside"
        for path in paths:
            with writing(path):
                target.mkdir(exist_ok=True)
                names = (path.name if n == 0 else f"{path.name}.{n}" for n in itertools.count())
                free = next(target / name for name in names if not (target / name).exists())
                shutil.move(path, free)  # `checkpoints` may be a link to another disk

    def explain(self, error: StorageError) -> str:
        """What could not be written, what is saved, and when to run the same command again."""
        steps = saved_steps(self.checkpoints_path)
        saved = f"step {steps[0]} is saved" if steps else "no step is saved yet"
        when = "there is room" if out_of_room(error.reason) else "that is mended"
        return f"{error}; {saved}, run the same command to continue once {when}"

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def check_same(self, config: Resolved) -> None:
        """Compares a config with that of the run that lies here, if one does: all but the path of
        the data set, and mean and std where they are unset.

        Raises: InputError: names what differs.
        """
        stored = self.stored
        if stored is None:
            return
        same_path = dataclasses.replace(stored.config, dataset=config.dataset)
        changed = differences(same_path, with_stored_stats(config, stored.config))
        if changed:
            raise self._another(changed)

    def _another(self, changed: list[str]) -> InputError:
        allowed = f"holds a run with another config ({', '.join(changed)})"
        return InputError("--workdir", str(self.path), allowed)


def read_stored(path: Path) -> Stored | None:
    """What a folder says of the run in it; None: there is none.

    Raises: InputError: files that cannot be read.
    """
    config_path, data_path = path / CONFIG_FILE, path / "dataset.json"
    try:
        if not config_path.exists():
            return None
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise InputError("--workdir", str(path), reason(error)) from None
    config = config_from_json(read_json(config_path, _PUT_BACK), str(config_path))
    if not data_path.exists():
        return Stored(config, None)
    data = read_json(data_path, _PUT_BACK).get("fingerprint")
    if not isinstance(data, dict):
        raise InputError(str(data_path), data, "the fingerprint of a data set is needed")
    return Stored(config, data)


def read_run(path: Path) -> Stored:
    """What a folder says of the run in it, which may go on: nothing is locked or changed.

    Returns: with a `Resolved` config.
    Raises: InputError: no run of this version lies there.
    """
    stored = read_stored(path)
    if stored is None:
        raise InputError("--workdir", str(path), "the folder of a run is needed")
    if not isinstance(stored.config, Resolved):
        allowed = "its config.json lacks fields; resume the run first, which completes it"
        raise InputError("--workdir", str(path), allowed)
    return stored


def prepare_again(stored: Stored, data_dir: str | None) -> Prepared:
    """The data set that a run was trained on.

    Args:
      stored: of the run.
      data_dir: where TFDS data sets lie; None: where the run found them.
    Raises: InputError: it cannot be read, or has changed.
    """
    config = stored.config
    prepared = prepare(dataclasses.replace(config, data_dir=data_dir or config.data_dir))
    if stored.data is not None and (change := difference(stored.data, prepared.info.fingerprint)):
        allowed = f"the run was trained on other data: {change}"
        raise InputError("config.dataset", config.dataset, allowed)
    return prepared


def with_stored_stats(config: Resolved, stored: Config) -> Resolved:
    """Mean and std of a run where the config leaves them unset."""
    return dataclasses.replace(
        config,
        mean=stored.mean if config.mean is None else config.mean,
        std=stored.std if config.std is None else config.std,
    )


def check_resumable(workdir: WorkDir, config: Resolved, lines: Collection[int]) -> None:
    """Refuses a folder whose checkpoints are gone though it had some.

    A run that was killed before its first checkpoint leaves metrics and perhaps an unfinished one,
    and starts anew.

    Args: config: resolved. lines: steps in its metrics.
    Raises: InputError.
    """
    folder = workdir.checkpoints_path
    if saved_steps(folder):
        return
    interval = config.checkpoint_every * config.steps_per_round
    had_some = {
        workdir.summary_path: workdir.summary_path.exists(),
        workdir.encoder_path: workdir.encoder_path.exists() and not has_unfinished(folder),
        # A save waits for the one before: beyond the second, the first was complete.
        workdir.metrics_path: max(lines, default=0) > (2 * interval if folder.exists() else 0),
    }
    for path, proves in had_some.items():
        if proves:
            allowed = f"no checkpoint lies beside {path.name}: put it back, or take another folder"
            raise InputError("--workdir", str(workdir.path), allowed)


_MOVE_AWAY = "move it away, or take another work directory"


def _check_files(workdir: WorkDir) -> None:
    """Raises: InputError: a folder lies where a file of the run belongs, or the reverse, or it is
    the folder of a sweep."""
    if (workdir.path / SWEEP_FILE).exists():
        allowed = "a sweep lies here, its runs in runs/NAME: another folder is needed"
        raise InputError("--workdir", str(workdir.path), allowed)
    files = (
        workdir.config_path,
        workdir.data_path,
        workdir.metrics_path,
        workdir.summary_path,
        workdir.encoder_path,
    )
    for path in files:
        if path.exists() and not path.is_file():
            raise InputError(str(path), "no regular file", _MOVE_AWAY)
    for path in (workdir.checkpoints_path, workdir.tensorboard_path):
        if path.exists() and not path.is_dir():
            raise InputError(str(path), "no folder", _MOVE_AWAY)


def _kind(dataset: str) -> str:
    """`folder` or `npz` for a path, else the name itself."""
    scheme, _, path = dataset.partition(":")
    return scheme if path and scheme in ("folder", "npz") else dataset


def hold(folder: Path, flag: str = "--workdir") -> TextIO:
    """Makes a folder this process's own until the returned file is closed or the process ends.

    Args: flag: of the command line, that chose the folder.
    Raises: InputError: the folder cannot be written, or is in use by a running process.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except FileExistsError:
        raise InputError(flag, str(folder), "this is a file: a folder is needed") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte
        allowed = f"cannot be written: {getattr(error, 'strerror', None) or error}"
        raise InputError(flag, str(folder), allowed) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        allowed = "in use by a running process: wait until it ends, or choose another folder"
        raise InputError(flag, str(folder), allowed) from None
    return lock


def check_free(folder: Path) -> None:
    """Whether `hold` would succeed, for a dry run: nothing is made or kept.

    Raises: InputError: as `hold`.
    """
    if (folder / ".lock").exists():
        hold(folder).close()
        return
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError("--workdir", str(folder), "cannot be written")

"""The files of a run: DIR/config.json, metrics.jsonl, summary.json, TensorBoard, the lock."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any, TextIO

from mocosfl_jax.config import EXECUTION_FIELDS
from mocosfl_jax.errors import InputError


class WorkDir:
    """A run's folder, held by one run at a time; of its processes the primary one writes.

    Raises: InputError: the folder cannot be written, is in use by a running process, or belongs to
    a run with another config.
    """

    def __init__(self, path: str | Path, primary: bool = True):
        self.primary = primary
        self.path = Path(path).expanduser().absolute()
        self.config_path = self.path / "config.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.summary_path = self.path / "summary.json"
        self.encoder_path = self.path / "encoder.safetensors"
        self.checkpoints_path = self.path / "checkpoints"
        self._lock = hold(self.path) if primary else None

    def claim(self, config: dict[str, Any]) -> None:
        """Writes the resolved config, or checks it against the one of the run that lies here.

        Raises: InputError: a field that is not an execution field differs.
        """
        config = json.loads(json.dumps(config))
        if self.config_path.exists():
            stored = read_json(self.config_path)
            names = sorted((stored.keys() | config.keys()) - EXECUTION_FIELDS)
            changed = [n for n in names if stored.get(n) != config.get(n)]
            if changed:
                values = ", ".join(f"{n} {stored.get(n)!r} -> {config.get(n)!r}" for n in changed)
                raise InputError(
                    "--workdir", str(self.path), f"holds a run with another config ({values})"
                )
        if self.primary:
            write_json(self.config_path, config)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()


def hold(folder: Path) -> TextIO:
    """Makes a folder this process's own until the returned file is closed or the process ends.

    Raises: InputError: the folder cannot be written, or is in use by a running process.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        allowed = f"cannot be written: {error.strerror}"
        raise InputError("--workdir", str(folder), allowed) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        allowed = "in use by a running process; wait or take another"
        raise InputError("--workdir", str(folder), allowed) from None
    return lock


class NoMetrics:
    """Takes no notes."""

    def add(self, step: int, **values: float) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Metrics(NoMetrics):
    """DIR/metrics.jsonl, one JSON object a line and one line a step, and TensorBoard scalars.

    What is added for one step is merged into its line, `last`, which is the last one of the file.
    """

    def __init__(self, workdir: WorkDir, step: int, tensorboard: bool):
        """Cuts the file back to `step`, that of the checkpoint from which the run resumes."""
        path = workdir.metrics_path
        kept = _lines_up_to(path, step) if step else []
        self.last: dict[str, Any] = kept.pop() if kept else {}
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")
        self._offset = self._file.tell()  # where the last line starts
        self._write_last()
        self._board = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(workdir.path / "tensorboard"), purge_step=step + 1)

    def add(self, step: int, **values: float) -> None:
        if self.last.get("step", step) != step:
            self._write_last()
            self._offset, self.last = self._file.tell(), {}
        self.last = {"step": step, **self.last, **values}
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Puts everything on disk."""
        self._write_last()
        self._file.flush()
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        self.flush()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _write_last(self) -> None:
        """Writes the last line anew; it may have grown since it was written."""
        self._file.truncate(self._offset)
        self._file.seek(self._offset)
        if self.last:
            self._file.write(json.dumps(self.last) + "\n")


def open_metrics(workdir: WorkDir, step: int, tensorboard: bool) -> NoMetrics:
    """`Metrics` of the primary process; the others take no notes."""
    return Metrics(workdir, step, tensorboard) if workdir.primary else NoMetrics()


def _lines_up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines of a metrics file up to a step, without one that a killed process left torn."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["step"] <= step:
            lines.append(line)
    return lines


def read_json(path: Path) -> Any:
    """Raises: InputError: the file is no JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(str(path), "unreadable", f"JSON is needed: {error}") from None


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces a file at once: a reader sees the old text or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)

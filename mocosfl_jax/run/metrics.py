"""The numbers of each step: DIR/metrics.jsonl, and TensorBoard scalars beside it."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from mocosfl_jax.errors import InputError
from mocosfl_jax.run.storage import write_text, writing

Line = dict[str, Any]
"""The numbers of one step, `step` among them."""


class Metrics:
    """Takes notes of a run; this one takes none."""

    def add(self, step: int, **values: float) -> None:
        """Notes numbers of a step, the last one noted or a later one."""

    def flush(self) -> None:
        """Puts everything on disk."""

    def close(self) -> None: ...


class MetricsFile(Metrics):
    """DIR/metrics.jsonl: one JSON object a line and one line a step.

    A line goes to the file when the next step's begins, or at a flush. It may grow after that, and
    is then overwritten in place by a single write, so that no kill loses what was on disk.
    """

    def __init__(self, path: Path, lines: dict[int, Line], board: "Board | None" = None):
        """Args: path: of the file; lines: what it shall start with, by step; board: may be None.

        Raises: StorageError.
        """
        self._path, self._board = path, board
        text = "".join(_dump(line) for line in lines.values())
        if not _is_alone(path) or path.read_bytes() != text.encode():
            write_text(path, text)
        self._last: Line = list(lines.values())[-1] if lines else {}
        self._written = _dump(self._last).encode() if lines else b""
        self._offset = len(text) - len(self._written)  # where the last line starts
        with writing(path):
            self._file = os.open(path, os.O_WRONLY)

    def add(self, step: int, **values: float) -> None:
        if self._last.get("step", step) != step:
            self._write_last()
            self._offset += len(self._written)
            self._written, self._last = b"", {}
        self._last = {"step": step, **self._last, **values}
        if self._board is not None:
            self._board.add(step, values)

    def flush(self) -> None:
        self._write_last()
        with writing(self._path):
            os.fsync(self._file)
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            os.close(self._file)
            if self._board is not None:
                self._board.close()

    def _write_last(self) -> None:
        text = _dump(self._last).encode() if self._last else b""
        if text == self._written:
            return
        text = text[:-1].ljust(len(self._written) - 1) + b"\n"  # JSON may end with blanks
        with writing(self._path):
            try:
                self._overwrite(text)
            except OSError:
                with contextlib.suppress(OSError):  # as it was, which takes no more room
                    os.pwrite(self._file, self._written, self._offset)
                    os.ftruncate(self._file, self._offset + len(self._written))
                raise
        self._written = text

    def _overwrite(self, text: bytes) -> None:
        done = os.pwrite(self._file, text, self._offset)
        while done < len(text):  # the disk is nearly full: the next write says why
            done += os.pwrite(self._file, text[done:], self._offset + done)


class Board:
    """TensorBoard scalars under DIR/tensorboard, written in the calling thread: a full disk is
    then an error here, not in a thread that dies unseen."""

    def __init__(self, folder: Path, first_step: int):
        """Args: first_step: later scalars that TensorBoard finds in older files are dropped.

        Raises: StorageError.
        """
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._folder, self._new_event = folder, event_pb2.Event
        with writing(folder):
            folder.mkdir(exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(event_pb2.Event(wall_time=time.time(), step=first_step, session_log=start))

    def add(self, step: int, values: dict[str, float]) -> None:
        """Raises: StorageError."""
        from tensorboardX.summary import scalar

        for name, value in values.items():
            event = self._new_event(wall_time=time.time(), step=step, summary=scalar(name, value))
            self._write(event)

    def flush(self) -> None:
        """Raises: StorageError."""
        with writing(self._folder):
            self._writer.flush()

    def close(self) -> None:
        """Raises: StorageError."""
        with writing(self._folder):
            self._writer.close()

    def _write(self, event: Any) -> None:
        with writing(self._folder):
            self._writer.write_event(event)


def read_metrics(path: Path) -> dict[int, Line]:
    """The lines of a metrics file by step, in order; of two lines of one step the last counts.

    A last line without an end was torn by a kill, and is left out.

    Raises: InputError: a line is no JSON object with a step, or the file cannot be read.
    """
    try:
        text = path.read_text() if path.exists() else ""
    except (OSError, ValueError) as error:
        raise InputError(str(path), "unreadable", f"lines of JSON are needed: {error}") from None
    lines: dict[int, Line] = {}
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        values = _parsed(line)
        if values is None:
            allowed = "a JSON object with a step is needed"
            raise InputError(f"{path}, line {number}", line[:80], allowed)
        lines[values["step"]] = values
    return dict(sorted(lines.items()))


def missing_steps(lines: dict[int, Line], step: int) -> list[list[int]]:
    """Steps up to `step` that have no line, as [first, last] of each gap."""
    present = sorted(s for s in lines if 1 <= s <= step)
    edges = zip([0, *present], [*present, step + 1], strict=True)
    return [[before + 1, after - 1] for before, after in edges if after - before > 1]


def _is_alone(path: Path) -> bool:
    """Whether the file exists under this name only: a hard link may be somebody's backup."""
    return path.exists() and not path.is_symlink() and path.stat().st_nlink == 1


def _parsed(line: str) -> Line | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    known = isinstance(values, dict) and type(values.get("step")) is int and values["step"] >= 0
    return values if known else None


def _dump(line: Line) -> str:
    return json.dumps(line) + "\n"

"""How a command speaks and ends: our own lines only, and a closed pipe ends nothing."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

from mocosfl_jax.errors import InputError
from mocosfl_jax.run.interrupt import end_when_interrupted
from mocosfl_jax.run.storage import StorageError

FAILED, BAD_INPUT = 1, 2
"""Exit statuses."""


class _Unbreakable:
    """A stream that goes on as if it had been read once its reader is gone."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _drop(self) -> None:
        """From now on, and at exit, what is buffered goes nowhere: the exit status stays."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def run_command(main: Callable[[list[str]], int], interrupted: str) -> NoReturn:
    """The end of a module that is a command: runs it on this process's arguments.

    Args:
      main: imports whatever takes time itself, so that Ctrl-C is answered meanwhile.
      interrupted: the line that Ctrl-C is answered with; see `end_when_interrupted`.
    """
    end_when_interrupted(interrupted)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    quiet_libraries()
    unbreakable_output()
    sys.exit(main(sys.argv))


def answered(command: str, run: Callable[[], int]) -> int:
    """The exit status of `run`; what it refuses or cannot write is a line on stderr.

    Args: command: as its lines name it, such as `mocosfl_jax.sweep`.
    """
    try:
        return run()
    except InputError as error:
        return end(command, error, BAD_INPUT)
    except StorageError as error:
        return end(command, error, FAILED)


def end(command: str, reason: object, status: int) -> int:
    """Says on stderr why a command ends; returns the status."""
    say_line(f"{command}: {reason}")
    return status


def say_line(text: str) -> None:
    """One line on stderr from any thread, in one write, so that no other thread's comes between."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def unbreakable_output() -> None:
    """Makes stdout and stderr of this process such streams; call it once, at the start."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the process was started without it
            stream = open(os.devnull, "w")  # noqa: SIM115  # open as long as the process
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Unbreakable(stream))


def quiet_libraries() -> None:
    """Drops what JAX, Orbax, TensorStore and asyncio print of files that turn out damaged, or of a
    disk that is full: the errors that matter reach us, and are said in one line."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = _hook


def _hook(found: "sys.UnraisableHookArgs") -> None:
    """asyncio still reports reads that were abandoned when their event loop closed."""
    if str(found.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(found)

"""Files of a run: read with one-line refusals, written so that a reader sees the old or the new."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mocosfl_jax.errors import InputError


class StorageError(OSError):
    """A file of the run cannot be written; the message names it and says why.

    What was saved before is intact, so the same command resumes once the cause is gone.
    """

    def __init__(self, path: Path, cause: BaseException):
        self.path, self.reason = path, reason(cause)
        super().__init__(f"{path} cannot be written: {self.reason}")


_NO_ROOM = ("No space left on device", "Disk quota exceeded", "File too large")


def reason(error: BaseException) -> str:
    """Why a file operation failed, in a few words, however deep a library has buried it."""
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
    for words in _NO_ROOM:  # libraries in C++ have only the text
        if any(words.lower() in str(link).lower() for link in chain):
            return words
    first = str(error).strip().splitlines() or [type(error).__name__]
    return re.split(r" See full |\s*\{", first[0])[0][:200]  # without the JSON text that follows


def out_of_room(why: str) -> bool:
    """Whether a reason is that a file has no room to grow."""
    return why in _NO_ROOM


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def read_json(path: Path, remedy: str = "") -> dict[str, Any]:
    """The object in a JSON file.

    Args: remedy: what a user may do about a file that is damaged.
    Raises: InputError: the file cannot be read, or holds anything else.
    """
    further = f"; {remedy}" if remedy else ""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        allowed = f"JSON is needed: {reason(error)}{further}"
        raise InputError(str(path), "unreadable", allowed) from None
    if not isinstance(value, dict):
        raise InputError(str(path), type(value).__name__, f"a JSON object is needed{further}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Raises: StorageError."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Raises: StorageError."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file at once.

    Raises: StorageError: it cannot be written; the old one stays.
    """
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            partial.write_bytes(content)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def writing(path: Path, failures: type[Exception] = OSError) -> Iterator[Path]:
    """Raises: StorageError: of the path, for any of the failures within; of a file, as it is."""
    try:
        yield path
    except StorageError:
        raise
    except failures as error:
        raise StorageError(path, error) from error

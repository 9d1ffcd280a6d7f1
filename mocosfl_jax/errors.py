"""The one exception that bad input raises, and silence for libraries that would add to it."""

import contextlib
import logging
import re
from collections.abc import Iterator

LONGEST = 500
"""Characters that a message quotes of a value or of a reason; the middle of longer ones is cut."""


class InputError(ValueError):
    """Bad input: a config field or a file that the run cannot use.

    The message is one printable line that names the field or file, its value and what is allowed.
    `main` prints it on stderr and exits with status 2.
    """

    def __init__(self, where: str, value: object, allowed: str):
        """Args: where: config field (`config.cut`) or file; value: as found; allowed: what is."""
        text = f"{where} = {_short(repr(value))}: {_short(allowed)}"
        super().__init__(one_line(re.sub(r" at 0x[0-9a-f]+", "", text)))  # of objects


@contextlib.contextmanager
def quiet_logs() -> Iterator[None]:
    """No log lines: what libraries say of missing or damaged files is for their developers."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _short(text: str) -> str:
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}"


def one_line(text: str) -> str:
    """The text with escapes for all that is not printable, such as line ends in file names.

    Bytes of a file name that are not UTF-8, which Python holds as lone surrogates, are escaped too:
    the result can be printed.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )

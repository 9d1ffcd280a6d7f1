"""Ctrl-C outside training: one line and exit status 130, from the first import on.

This module imports nothing that takes time, so that it can come before all that does.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import NoReturn

STATUS = 128 + signal.SIGINT

BUSY_SECONDS = 0.5
"""How long the main thread may take to answer before another thread does so."""


def end_when_interrupted(line: str) -> None:
    """From now on SIGINT ends this process at once, with this line on stderr.

    An exception would not do: modules in C turn it into an ImportError, and callbacks of the
    garbage collector swallow it. Files are replaced atomically, so what was saved stays. Whoever
    sets another handler, as `stop_requests` does, takes the signal over; call this in the main
    thread, once.
    """

    def answer(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one is the same request
        _say(line)
        # The interrupted code may be in the middle of writing, or nobody listens any more.
        with contextlib.suppress(OSError, RuntimeError):
            sys.stdout.flush()
        os._exit(STATUS)

    def listen() -> None:
        """Python runs handlers in the main thread, which XLA holds while it compiles; the number
        of a signal is also written to a pipe at once."""
        while byte := os.read(ear, 1):
            if byte[0] != signal.SIGINT:
                continue
            time.sleep(BUSY_SECONDS)
            if signal.getsignal(signal.SIGINT) is answer:
                _say(line)
                os._exit(STATUS)

    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, answer)
    threading.Thread(target=listen, daemon=True).start()


def _say(line: str) -> None:
    """Past Python's own streams, which the interrupted code may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())

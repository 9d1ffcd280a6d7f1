"""Signals that ask a run to stop."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Whether SIGTERM or SIGINT came."""

    def __init__(self) -> None:
        self.came = False

    def requested(self) -> bool:
        """Asked once a dispatch; the same answer on every process."""
        return self.came


class JointStopRequest(StopRequest):
    """Of several processes: JAX's coordination service sees SIGTERM on any of them, and names the
    call at which all stop."""

    def __init__(self) -> None:
        self._calls = 0

    def requested(self) -> bool:
        self._calls += 1  # consecutive numbers: the service picks one that lies ahead of all
        return multihost_utils.reached_preemption_sync_point(self._calls)


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turns the first SIGTERM or SIGINT into a request; a second one acts as usual."""
    if jax.process_count() > 1:
        yield JointStopRequest()
        return
    stop = StopRequest()
    names = (signal.SIGTERM, signal.SIGINT)
    before = {name: signal.getsignal(name) for name in names}

    def request(number: int, frame: Any) -> None:
        stop.came = True
        for name in names:
            signal.signal(name, before[name])

    for name in names:
        signal.signal(name, request)
    try:
        yield stop
    finally:
        for name in names:
            signal.signal(name, before[name])

"""Signals that ask a run to stop: answered at once, heeded where the run can be resumed."""

import contextlib
import math
import signal
import socket
import threading
import time
from collections.abc import Iterator

from mocosfl_jax.run.processes import (
    POLL_SECONDS,
    Notices,
    end_process,
    leave,
    say,
    several,
)

SIGNALS = (signal.SIGTERM, signal.SIGINT)

ECHO_SECONDS = 0.5
"""Within which another signal is the same request: `timeout`, for one, sends its signal to the
process and then to its group."""

AGREEMENT_SECONDS = 30.0
"""How long a process waits for the others to say how far they are; one that does not has died."""

_STOPPING = "stopping when the state is saved; a second signal stops at once"


class StopRequested(Exception):  # noqa: N818  # a request, no error
    """A signal came: what is running was cut short at a point where this is safe."""


class StopRequest:
    """Whether the run is to stop.

    came: the first signal that this process got, if any.
    """

    def __init__(self) -> None:
        self.came: signal.Signals | None = None

    def requested(self) -> bool:
        """Whether nothing new is to be started: no dispatch, compilation, batch or epoch.

        Cheap enough to be asked before each of them. Once true it stays so. All processes of a run
        must ask in the same order, equally often; then they get the same answer at the same call.
        """
        return self.came is not None

    def check(self) -> None:
        """Raises: StopRequested: `requested`, of which this is a call."""
        if self.requested():
            raise StopRequested

    def fail(self, reason: str) -> None:
        """Ends all processes of a run, as this one cannot go on; one that is alone goes its way."""

    def close(self) -> None: ...


class JointStopRequest(StopRequest):
    """Shared by several processes, any of which may get the signal.

    A thread on each looks for the notice that one was asked to stop. Then it keeps its main thread
    from asking on (by the lock), says how many calls were answered, waits for the other threads to
    do so, and names the call at which all stop. Main threads may be stuck in a collective
    meanwhile: none of them is waited for.
    """

    def __init__(self, notices: Notices):
        super().__init__()
        self._notices = notices
        self._calls = 0
        self._first_yes = math.inf  # number of the call
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def requested(self) -> bool:
        with self._lock:
            self._calls += 1
            return self._calls >= self._first_yes

    def fail(self, reason: str) -> None:
        say(reason)
        self._notices.post("failure", reason)
        leave(self._notices, 1)

    def close(self) -> None:
        """Leaves the number of calls for processes that are asked to stop later."""
        self._closing.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._closing.wait(POLL_SECONDS) and not self._asked():
            self._leave_with_others()
        with self._lock:
            self._notices.post("calls", str(self._calls))
            if not self._closing.is_set():
                self._first_yes = self._agreed_call()

    def _leave_with_others(self) -> None:
        """Ends this process if another one has failed: its main thread may be waiting for it."""
        failures = self._notices.read("failure")
        if failures and self._notices.process not in failures:
            process, reason = min(failures.items())
            say(f"process {process} failed: {reason}")
            leave(self._notices, 1)

    def _asked(self) -> bool:
        """Whether any process was, about which all are told."""
        if self.came is not None:
            self._notices.post("signal", self.came.name)
            return True
        notes = self._notices.read("signal")
        if notes:
            process, name = min(notes.items())
            say(f"{name} on process {process}: {_STOPPING}")
        return bool(notes)

    def _agreed_call(self) -> int:
        """The first call that no process has had an answer to.

        The last call that any process had answered was a no. After it, that process may be waiting
        in a collective which the others must join, so they get a no there, too. At the call after
        it, every process can get the same yes: none has passed it, and none can before this is
        known, as its lock is held since it counted.
        """
        calls = self._notices.wait("calls", AGREEMENT_SECONDS)
        return max([self._calls, *map(int, calls.values())]) + 1


@contextlib.contextmanager
def stop_requests(answer: str = _STOPPING) -> Iterator[StopRequest]:
    """Turns the first SIGTERM or SIGINT into a request, and says so on stderr at once.

    A second one ends the process with status 128 + its number, also while the main thread is busy
    outside Python; files are replaced atomically, so what was saved before stays. All processes of
    a run enter and leave together. Outside the main thread, to which Python hands all signals, no
    request ever comes.

    Args: answer: what is said after the name of the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield StopRequest()
        return
    stop = JointStopRequest(Notices()) if several() else StopRequest()
    with contextlib.closing(stop), _heard_by(stop, answer):
        yield stop


@contextlib.contextmanager
def _heard_by(stop: StopRequest, answer: str) -> Iterator[None]:
    """Python runs handlers in the main thread, which XLA holds while it compiles or computes; the
    number of a signal is also written to a socket at once, from which a thread reads it."""

    def note(number: int, _: object) -> None:
        stop.came = stop.came or signal.Signals(number)

    ear, mouth = socket.socketpair()
    mouth.setblocking(False)
    listener = threading.Thread(target=_listen, args=(ear, stop, answer), daemon=True)
    listener.start()
    wakeup_before = signal.set_wakeup_fd(mouth.fileno())
    handlers_before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup_before)
        mouth.close()
        listener.join()
        ear.close()


def _listen(ear: socket.socket, stop: StopRequest, answer: str) -> None:
    """Answers every signal until the other end is closed."""
    first = math.inf
    while byte := ear.recv(1):
        number = byte[0]
        if number not in SIGNALS:
            continue
        now, came = time.monotonic(), signal.Signals(number)
        if now > first + ECHO_SECONDS:
            say(f"{came.name} again: stopped at once")
            end_process(128 + number)
        if first == math.inf:
            first = now
            stop.came = stop.came or came
            say(f"{came.name}: {answer}")

"""The processes that run together: how they join, what they tell each other before the first step.

Everything here goes through the coordination service of `jax.distributed`, which process 0 hosts;
no device takes part.
"""

import contextlib
import itertools
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
from jax._src import distributed  # for `Notices`: JAX has no public access to its key-value store

from mocosfl_jax.errors import InputError
from mocosfl_jax.run.console import say_line
from mocosfl_jax.run.storage import StorageError

JOIN_SECONDS = 300
"""How long a process waits for the others to start."""

POLL_SECONDS = 0.25
"""Between two looks at the notes of other processes."""

FAREWELL_SECONDS = 4.0
"""How long process 0 waits for the others to leave before it does."""

HOST_FIELDS = frozenset({"compilation_cache", "data_dir", "dataset", "progress", "tensorboard"})
"""Config fields that may differ from process to process. Of a dataset the name or path may, its
content may not."""


# ------------------------------------------------------------------------------------- joining


def initialize(
    multihost: bool, coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Joins the processes of a run; must come before any other use of JAX. No argument: alone.

    If they have not all come after `JOIN_SECONDS`, the process ends with one line and status 1.

    Args:
      multihost: everything from the environment: Slurm, Kubernetes, TPU pod or Open MPI.
      coordinator: host:port of process 0, reachable from all; the other two go with it.
      num_processes: of the run.
      process_id: of this one, from 0.
    Raises: InputError: an incomplete set of arguments, no such environment, or process 0 cannot
    listen on its port.
    """
    explicit = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in explicit.items() if value is None]
    if len(missing) == len(explicit):
        if multihost:
            _join(None, None, None)
        return
    if missing:
        given = next(name for name in explicit if name not in missing)
        raise InputError(missing[0], None, f"needed together with {given}")
    assert coordinator is not None and num_processes is not None and process_id is not None
    if not re.fullmatch(r".+:\d+", coordinator):
        raise InputError("--coordinator", coordinator, "HOST:PORT is needed")
    if not 0 <= process_id < num_processes:
        raise InputError("--process_id", process_id, f"from 0 to {num_processes - 1}")
    if process_id == 0:
        _check_port(coordinator)
    _join(coordinator, num_processes, process_id)


def _check_port(coordinator: str) -> None:
    """Where it cannot be listened on, JAX raises an unclear error or crashes.

    Raises: InputError.
    """
    try:
        socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
    except (OSError, OverflowError) as error:
        allowed = f"process 0 cannot listen on this port: {error}"
        raise InputError("--coordinator", coordinator, allowed) from None


def _join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Args: as `initialize`; None: from the environment."""
    flag, given = ("--coordinator", coordinator) if coordinator else ("--multihost", True)
    timer = threading.Timer(JOIN_SECONDS, _give_up, (flag, given))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=2 * JOIN_SECONDS
        )
    except ValueError as error:  # what JAX raises where it recognises no cluster
        allowed = f"no Slurm, Kubernetes, TPU or Open MPI environment: {error}"
        raise InputError(flag, given, allowed) from None
    finally:
        timer.cancel()
    if threading.current_thread() is threading.main_thread():
        # Joining has replaced the handler behind Python's back by one that swallows the signal.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _give_up(flag: str, given: object) -> None:
    """Comes before JAX's own time limit, which aborts the process with a stack trace."""
    say(f"{flag} = {given!r}: the processes of the run did not all come within {JOIN_SECONDS} s")
    end_process(1)


def several() -> bool:
    """Whether this is one of several processes of a run."""
    return jax.distributed.is_initialized() and distributed.global_state.num_processes > 1


def is_primary() -> bool:
    """Whether this process writes logs and files."""
    return jax.process_index() == 0


# ------------------------------------------------------------------------- talking and leaving


class Notices:
    """A notice board of all processes: each may post one note on a topic.

    All processes make their boards in the same order. Any thread may use one. While the service is
    out of reach nothing is posted or read; JAX ends a process that has lost it for good.

    process: number of this one. processes: how many there are.
    """

    _boards = itertools.count()

    def __init__(self) -> None:
        state = distributed.global_state
        self.process, self.processes = state.process_id, state.num_processes
        self._client: Any = state.client
        self._folder = f"mocosfl_jax/{next(self._boards)}"

    def post(self, topic: str, text: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{self._folder}/{topic}/{self.process}", text)

    def read(self, topic: str) -> dict[int, str]:
        """The notes by process, of those that have posted one."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            notes = self._client.key_value_dir_get(f"{self._folder}/{topic}/")
            return {int(key.rpartition("/")[2]): text for key, text in notes}
        return {}

    def wait(self, topic: str, seconds: float = math.inf) -> dict[int, str]:
        """The notes of all processes, or of those that have posted one after so many seconds."""
        deadline = time.monotonic() + seconds
        while len(notes := self.read(topic)) < self.processes and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return notes


def say(text: str) -> None:
    """One line on stderr, from any thread."""
    with contextlib.suppress(OSError):  # nobody listens any more
        say_line(f"mocosfl_jax: {text}")


def end_process(status: int) -> NoReturn:
    """Ends this process from any thread, whatever its main thread does."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status)


def leave(notices: Notices, status: int) -> NoReturn:
    """Ends this process, one of several that all leave."""
    notices.post("leaving", "")
    if notices.process == 0:  # without its service JAX aborts the others
        notices.wait("leaving", FAREWELL_SECONDS)
        time.sleep(2 * POLL_SECONDS)  # they have said so, and need a moment to do so
    end_process(status)


# ------------------------------------------------------------------------------------ start-up


class Startup:
    """What comes before the first collective; a process that runs alone has nobody to tell."""

    def agree(self, values: Mapping[str, Any]) -> None:
        """Makes sure that all processes mean the same run; all call it, in the same order.

        Args: values: JSON values by the name that a message gives them, e.g. `config.seed`.
        Raises: InputError: on all processes, if one has another value than process 0.
        """

    def ready(self) -> None:
        """Returns when all processes have come here; from then on refusals are not shared."""

    def refuse(self, reason: str, status: int) -> None:
        """Tells all processes why the run cannot start, and ends them with this status."""

    def close(self) -> None:
        """Shares no more refusals."""


class JointStartup(Startup):
    """A thread watches out for the refusals of other processes, as the main thread may be decoding
    images or waiting for a process that will not come."""

    def __init__(self, notices: Notices):
        self._notices = notices
        self._agreements = itertools.count()
        self._over = threading.Event()
        self._leaving = threading.Lock()  # of the thread that ends the process: never released
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def agree(self, values: Mapping[str, Any]) -> None:
        topic = f"agreement {next(self._agreements)}"
        self._notices.post(topic, json.dumps(dict(values)))
        notes = {i: json.loads(note) for i, note in self._notices.wait(topic).items()}
        for process in sorted(notes):
            _compare(notes[0], notes[process], process)

    def ready(self) -> None:
        if self._over.is_set():
            return
        self._notices.post("ready", "")
        self._notices.wait("ready")
        self.close()

    def refuse(self, reason: str, status: int) -> None:
        if self._over.is_set():
            return
        self._leaving.acquire()
        self._notices.post("refusal", f"{status} {reason}")
        self._leave(reason, status)

    def close(self) -> None:
        self._over.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            refusals = self._notices.read("refusal")
            if refusals:
                process, note = min(refusals.items())
                status, _, reason = note.partition(" ")
                self._leaving.acquire()
                self._leave(f"process {process} refused: {reason}", int(status))

    def _leave(self, reason: str, status: int) -> NoReturn:
        """The usual way out would wait for the other processes, whose main threads are busy."""
        say(reason)
        leave(self._notices, status)


def _compare(wanted: dict[str, Any], values: dict[str, Any], process: int) -> None:
    """Raises: InputError: a process has another value than process 0."""
    for name in sorted(wanted.keys() | values.keys()):
        ours, theirs = wanted.get(name), values.get(name)
        if ours != theirs:
            allowed = f"on process {process}, but {ours!r} on process 0; make them equal"
            raise InputError(name, theirs, allowed)


def common_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `Startup.agree` is to compare of a config, given by field: all but `HOST_FIELDS`."""
    return {f"config.{name}": value for name, value in config.items() if name not in HOST_FIELDS}


@contextlib.contextmanager
def shared_refusals() -> Iterator[Startup]:
    """The start-up of a run, from joining to `Startup.ready`.

    Until then an InputError or a StorageError that leaves the block on one process ends all of
    them: each prints one line on stderr and exits with status 2 or 1; so does a signal, with 143 or
    130. What comes to a run of one process is left to the caller.
    """
    if not several():
        yield Startup()
        return
    startup = JointStartup(Notices())
    _refuse_when_stopped(startup)
    try:
        yield startup
    except InputError as error:
        startup.refuse(str(error), status=2)
        raise
    except StorageError as error:
        startup.refuse(str(error), status=1)
        raise
    finally:
        startup.close()


def _refuse_when_stopped(startup: Startup) -> None:
    """SIGTERM and SIGINT end all processes until the loop takes them over (`stop_requests`)."""

    def refuse(number: int, _: object) -> None:
        status = 128 + number
        startup.refuse(f"{signal.Signals(number).name} before the first step", status)
        end_process(status)  # the run is over

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, refuse)


# ------------------------------------------------------------------------------------ programs


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in a folder, unless the environment names another one or it is
    `none`; one that cannot be written is left alone by JAX, with a warning that no command
    shows (`quiet_libraries`)."""
    if folder != "none" and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))

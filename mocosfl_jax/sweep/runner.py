"""Carries out the unfinished runs of a sweep and their commands, and shows how far it is."""

import contextlib
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from tqdm import tqdm

from mocosfl_jax.sweep.definition import counted
from mocosfl_jax.sweep.engines import Engine, Job, Task
from mocosfl_jax.sweep.folder import last_line

GRACE_SECONDS = 300.0
"""How long runs may take to save and end when the sweep is stopped."""


@dataclass
class Tally:
    """How many runs of a sweep are done, failed, running and left."""

    total: int
    slots: int
    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # run: why
    running: dict[str, float] = field(default_factory=dict)  # run: when its first task started
    seconds: list[float] = field(default_factory=list)  # durations of the runs done here

    @property
    def left(self) -> int:
        return self.total - self.done - len(self.failed) - len(self.running)

    def __str__(self) -> str:
        parts = [f"{self.done} of {self.total} runs done", f"{len(self.running)} running"]
        if self.failed:
            parts.append(f"{len(self.failed)} failed")
        parts.append(f"{self.left} left")
        if self.seconds:
            parts.append(f"{self._time_left()} to go")
        return ", ".join(parts)

    def _time_left(self) -> str:
        """From the mean time of a run."""
        now = time.monotonic()
        remaining = self.left + len(self.running)
        work = remaining * statistics.mean(self.seconds)
        work -= sum(now - started for started in self.running.values())
        return tqdm.format_interval(max(0, work / max(1, min(self.slots, remaining))))


class Board:
    """Progress: on a terminal a line that is rewritten in place, elsewhere one line per event."""

    def __init__(self, tally: Tally, stream: TextIO | None = None):
        """Args: tally: shown; stream: None: stdout."""
        self._tally, self._stream = tally, stream or sys.stdout
        self._terminal = self._stream.isatty()

    def event(self, text: str) -> None:
        if self._terminal:
            print(f"\r\x1b[K{text}", file=self._stream)
            self.refresh()
        else:
            print(f"{text} ({self._tally})", file=self._stream, flush=True)

    def refresh(self) -> None:
        if self._terminal:
            print(f"\r\x1b[K{self._tally}", end="", file=self._stream, flush=True)

    def close(self) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=self._stream, flush=True)


class StopRequest:
    """number: of the signal that asked the sweep to stop; urgent: whether a second one came."""

    number: int | None = None
    urgent = False

    def __call__(self, number: int, _: object) -> None:
        self.urgent = self.number is not None
        self.number = self.number or number


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turns SIGTERM, SIGINT and SIGHUP into a request."""
    stop = StopRequest()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def carry_out(
    tasks: Sequence[Task],
    engine: Engine,
    tally: Tally,
    board: Board,
    stop: StopRequest,
    ended_well: Callable[[Task], None] = lambda task: None,
) -> None:
    """Starts every task and waits for all; ends those that run when a stop is requested.

    What follows a task that ended well is next in turn: a run is completed before another begins.

    Args:
      tasks: one a run, in their order.
      engine: where they run.
      tally: kept up to date; lists the failed ones at the end.
      board: told of each start and end.
      stop: watched.
      ended_well: told of each task that did.
    """
    waiting = list(tasks)
    running: list[tuple[Task, Job]] = []
    try:
        while (waiting or running) and stop.number is None:
            free = min(len(waiting), engine.slots - len(running))
            starting, waiting = waiting[:free], waiting[free:]
            if starting:
                running += zip(starting, engine.start(starting), strict=True)
            for task in starting:
                tally.running.setdefault(task.name, time.monotonic())
                board.event(f"started {task}")
            ended = [(task, job) for task, job in running if job.poll() is not None]
            running = [pair for pair in running if pair not in ended]
            settled = [_settle(task, job, tally, board, ended_well) for task, job in ended]
            waiting = [task for task in settled if task is not None] + waiting
            board.refresh()
            if not ended:
                time.sleep(engine.seconds_between_polls)
    finally:
        if running:
            board.event(f"waiting for {counted(len(running))} to save and end")
        _end([job for _, job in running], engine, stop)
        board.close()


def _settle(
    task: Task, job: Job, tally: Tally, board: Board, ended_well: Callable[[Task], None]
) -> Task | None:
    """Records a task that is over; returns what follows it, if anything."""
    if job.poll() == 0:
        ended_well(task)
        if task.then is not None:
            return task.then
    seconds = time.monotonic() - tally.running.pop(task.name)
    if job.poll() == 0:
        tally.done += 1
        tally.seconds.append(seconds)
        board.event(f"finished {task.name} in {tqdm.format_interval(seconds)}")
    else:
        blamed = f"{task.title}: " if task.title else ""
        tally.failed[task.name] = f"{blamed}exit status {job.poll()}: {last_line(task.log)}"
        board.event(f"failed {task}")
    return None


def _end(jobs: Sequence[Job], engine: Engine, stop: StopRequest) -> None:
    """Lets jobs save and end; kills those that do not within the grace period."""
    for job in jobs:
        job.stop()
    deadline = time.monotonic() + GRACE_SECONDS
    while any(job.poll() is None for job in jobs):
        if stop.urgent or time.monotonic() > deadline:
            break
        time.sleep(engine.seconds_between_polls)
    for job in jobs:
        if job.poll() is None:
            job.kill()

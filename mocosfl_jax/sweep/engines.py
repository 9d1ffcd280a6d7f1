"""Where runs are carried out: processes on this machine, or jobs of a Slurm cluster.

An engine starts tasks and returns a job for each; the runner (`runner.py`) does the rest.
"""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mocosfl_jax.errors import InputError


@dataclass(frozen=True)
class Task:
    """A command of a run as an engine sees it: its training, or one that follows it."""

    name: str  # of the run
    command: tuple[str, ...]
    log: Path  # what the command prints is appended to it
    title: str = ""  # what the sweep calls a command after training
    then: "Task | None" = None  # what is started when this has ended well

    def __str__(self) -> str:
        return f"{self.name}: {self.title}" if self.title else self.name


class Job(Protocol):
    """A task that has been started."""

    def poll(self) -> int | None:
        """Its exit status; None while it is not over."""

    def stop(self) -> None:
        """Asks it to save and end."""

    def kill(self) -> None:
        """Ends it at once."""


class Engine(Protocol):
    """Starts tasks, `slots` at a time."""

    slots: int
    seconds_between_polls: float

    def start(self, tasks: Sequence[Task]) -> list[Job]:
        """Returns one job per task; the caller keeps at most `slots` of them running."""


def launch(
    task: Task, environment: dict[str, str] | None = None, keep_open: Iterable[int] = ()
) -> "LocalJob":
    """Starts the task's command in its own session, so that only this process signals it.

    Args:
      task: its command and log.
      environment: variables that are added to those of this process.
      keep_open: file descriptors that the child inherits.
    """
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with task.log.open("a") as log:
        print("$", shlex.join(task.command), file=log, flush=True)
        return LocalJob(
            task.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            start_new_session=True,
            pass_fds=tuple(keep_open),
        )


# ---------------------------------------------------------------------------------------- local


class LocalJob(subprocess.Popen):
    """A child process."""

    stop = subprocess.Popen.terminate

    def kill(self) -> None:
        super().kill()
        self.wait()


class LocalEngine:
    """Child processes, a fixed number at a time, which share the GPUs of this machine."""

    seconds_between_polls = 0.2

    def __init__(self, slots: int | None, gpus: Sequence[str] = (), keep_open: Iterable[int] = ()):
        """Args:
        slots: processes at a time; None: one per GPU, or one without GPUs.
        gpus: names for CUDA_VISIBLE_DEVICES.
        keep_open: file descriptors that children inherit.
        """
        self.slots = slots or max(1, len(gpus))
        self._gpus, self._keep_open = gpus, tuple(keep_open)
        self._jobs: dict[int, LocalJob] = {}  # the last one of each slot

    def start(self, tasks: Sequence[Task]) -> list[Job]:
        return [self._start(task) for task in tasks]

    def _start(self, task: Task) -> Job:
        running = {slot for slot, job in self._jobs.items() if job.poll() is None}
        slot = min(set(range(self.slots)) - running)
        self._jobs[slot] = launch(task, self.environment(slot), self._keep_open)
        return self._jobs[slot]

    def environment(self, slot: int) -> dict[str, str]:
        """Variables that give a slot its GPUs: an equal share, or one GPU that several slots share
        if there are fewer GPUs than slots."""
        if not self._gpus:
            return {}
        if self.slots <= len(self._gpus):
            return {"CUDA_VISIBLE_DEVICES": ",".join(self._gpus[slot :: self.slots])}
        return {
            "CUDA_VISIBLE_DEVICES": self._gpus[slot % len(self._gpus)],
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # no process takes all of its memory
        }


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip()]
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [line for line in listing.stdout.splitlines() if line.startswith("GPU ")]
    return [str(index) for index in range(len(lines))]


# ---------------------------------------------------------------------------------------- Slurm

SECONDS_TO_SAVE = 120  # that Slurm's signal comes before a job's end
MOST_TIMEOUTS = 1000  # after which a job is given up


class RequeuedTask:
    """What a Slurm job calls: runs the task's command, and saves it before the job's time is over.

    Submitit calls `checkpoint` when Slurm's signal comes, and puts the job back into the queue.
    """

    def __init__(self, task: Task):
        self._task = task
        self._child: LocalJob | None = None
        self._status: Future[int] | None = None

    def __call__(self) -> int:
        child = self._child = launch(self._task)
        for number in (signal.SIGTERM, signal.SIGINT):  # the job is cancelled
            signal.signal(number, lambda *_: child.stop())
        with ThreadPoolExecutor(1) as pool:
            self._status = pool.submit(child.wait)
            return self._status.result()

    def checkpoint(self) -> Any:
        """Ends the child, which saves its state, and returns the task for another submission."""
        from submitit.helpers import DelayedSubmission

        if self._child is not None and self._status is not None:
            self._child.stop()
            self._status.result()
        return DelayedSubmission(RequeuedTask(self._task))


class SlurmJob:
    """A job of the cluster."""

    def __init__(self, job: Any, log: Path):
        self._job, self._log = job, log
        self._status: int | None = None

    def poll(self) -> int | None:
        if self._status is None and self._job.done():
            self._status = self._result()
        return self._status

    def stop(self) -> None:
        self._job.cancel(check=False)

    kill = stop  # the cluster kills what does not end in its own grace period

    def _result(self) -> int:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        try:
            return self._job.result()
        except (FailedJobError, UncompletedJobError) as error:
            with self._log.open("a") as log:
                print(" ".join(str(error).split()), file=log)
            return 1


class SlurmEngine:
    """Jobs of a cluster; those that start together are submitted as one array."""

    def __init__(
        self, folder: Path, slots: int | None, parameters: dict[str, Any], cluster: str = "slurm"
    ):
        """Args:
          folder: for the files of submitit.
          slots: jobs at a time; None: all.
          parameters: `config.slurm`.
          cluster: submitit's name for it.
        Raises: InputError: there is no such cluster or no submitit here, or a wrong parameter.
        """
        try:
            import submitit
        except ImportError:
            allowed = "submitit is needed: pip install 'mocosfl_jax[slurm]'"
            raise InputError("--engine", "slurm", allowed) from None
        self.slots = slots or sys.maxsize
        self._parameters = parameters
        self.seconds_between_polls = 5.0 if cluster == "slurm" else 0.2
        shared = ("timeout_min", "gpus_per_node", "cpus_per_task", "mem_gb")
        named = {
            name if name in shared else f"slurm_{name}": value for name, value in parameters.items()
        }
        try:
            self._executor = submitit.AutoExecutor(
                folder, cluster=cluster, slurm_max_num_timeout=MOST_TIMEOUTS
            )
            self._executor.update_parameters(
                name="mocosfl_sweep",
                slurm_signal_delay_s=SECONDS_TO_SAVE,
                **named,
            )
        except (RuntimeError, ValueError, NameError) as error:
            raise InputError("--engine", "slurm", str(error)) from None

    def start(self, tasks: Sequence[Task]) -> list[Job]:
        """Raises: InputError: the cluster refuses the jobs."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        try:
            jobs = self._executor.submit_array([RequeuedTask(task) for task in tasks])
        except (FailedJobError, FailedSubmissionError) as error:
            raise InputError("config.slurm", self._parameters, str(error)) from None
        return [SlurmJob(job, task.log) for job, task in zip(jobs, tasks, strict=True)]

"""Several processes over loopback: how they join, agree and refuse. The scripts are tiny runs."""

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mocosfl_jax.errors import InputError
from mocosfl_jax.run import processes
from mocosfl_jax.run.processes import JointStartup, Notices, common_fields, shared_refusals

ROOT = Path(__file__).parent.parent

JOIN = """
import sys, time
from mocosfl_jax.run import processes
from mocosfl_jax.errors import InputError
process, number, port = map(int, sys.argv[1:])
"""
JOINED = f"""{JOIN}
processes.initialize(False, f"localhost:{{port}}", number, process)
"""


def start(script: str, number: int, port: int | None = None) -> list[subprocess.Popen]:
    """The script once for each process, which finds its number, their number and the port in
    its arguments."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = port or free.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, str(process), str(number), str(port)],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(number)
    ]


def finish(running: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each."""
    outputs = [process.communicate(timeout=100) for process in running]
    return [(p.returncode, *output) for p, output in zip(running, outputs, strict=True)]


class Wall(Notices):
    """The notices of threads that play processes."""

    def __init__(self, process: int, notes: list[dict[str, str]]):
        self.process, self.processes, self._notes = process, len(notes), notes

    def post(self, topic, text):
        assert topic not in self._notes[self.process]
        self._notes[self.process][topic] = text

    def read(self, topic):
        return {i: notes[topic] for i, notes in enumerate(self._notes) if topic in notes}


def walls(number: int) -> list[Wall]:
    """The notice boards of so many processes."""
    notes: list[dict[str, str]] = [{} for _ in range(number)]
    return [Wall(process, notes) for process in range(number)]


@pytest.fixture(autouse=True)
def look_often(monkeypatch):
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.005)


# ------------------------------------------------------------------------------------- joining


def test_processes_that_do_not_come_are_not_waited_for_forever():
    script = JOIN + (
        "processes.JOIN_SECONDS = 1\n"
        "processes.initialize(False, f'localhost:{port}', number + 1, process)\n"
    )
    ((status, _, stderr),) = finish(start(script, 1))
    assert status == 1
    (line,) = stderr.splitlines()
    assert line.startswith("mocosfl_jax: --coordinator = 'localhost:")
    assert line.endswith("the processes of the run did not all come within 1 s")


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("", 0)) as taken:
        coordinator = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(InputError) as error:
            processes.initialize(False, coordinator, 2, 0)
    message = f"--coordinator = '{coordinator}': process 0 cannot listen on this port: "
    assert str(error.value).startswith(message)


def test_sigterm_ends_a_process_that_has_just_joined():
    ((status, _, _),) = finish(start(JOINED + "import os\nos.kill(os.getpid(), 15)", 1))
    assert status == -signal.SIGTERM


# ------------------------------------------------------------------------------------ start-up


@pytest.mark.parametrize("refusing", [0, 1])
def test_a_refusal_ends_all_processes_with_one_line_each(refusing):
    """While the main thread of the other one is busy."""
    script = JOINED + (
        "with processes.shared_refusals():\n"
        f"    if process == {refusing}:\n"
        "        raise InputError('--workdir', 'runs/a', 'in use')\n"
        "    time.sleep(90)\n"
    )
    outputs = finish(start(script, 2))
    other = 1 - refusing
    reason = "--workdir = 'runs/a': in use"
    assert outputs[refusing] == (2, "", f"mocosfl_jax: {reason}\n")
    assert outputs[other] == (2, "", f"mocosfl_jax: process {refusing} refused: {reason}\n")


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_before_the_first_step_ends_all_processes(signalled):
    """While the main thread of the other one is busy."""
    script = JOINED + (
        "with processes.shared_refusals():\n"
        f"    if process == {signalled}:\n"
        "        import signal\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "    time.sleep(90)\n"
    )
    outputs = finish(start(script, 2))
    other = 1 - signalled
    reason = "SIGTERM before the first step"
    assert outputs[signalled] == (143, "", f"mocosfl_jax: {reason}\n")
    assert outputs[other] == (143, "", f"mocosfl_jax: process {signalled} refused: {reason}\n")


def test_processes_with_different_configs_refuse():
    script = JOINED + (
        "with processes.shared_refusals() as startup:\n"
        "    startup.agree({'config.cut': 2, 'config.seed': 3 + process})\n"
        "    startup.ready()\n"
        "    print('ready')\n"
    )
    reason = "config.seed = 4: on process 1, but 3 on process 0; make them equal"
    for status, stdout, stderr in finish(start(script, 2)):
        assert (status, stdout) == (2, "")
        (line,) = stderr.splitlines()  # its own words, or those of a process that was faster
        assert line.startswith("mocosfl_jax: ")
        assert line.endswith(reason)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            [{"dataset": "a1", "config.mean": (0.5,)}] * 2 + [{"dataset": "b2"}],
            "config.mean = None: on process 2, but [0.5] on process 0; make them equal",
        ),
        (
            [{"dataset": "a1"}, {"dataset": "b2"}, {"dataset": "c3"}],
            "dataset = 'b2': on process 1, but 'a1' on process 0; make them equal",
        ),
    ],
)
def test_a_difference_is_named_on_all_processes(values, message):
    startups = [JointStartup(wall) for wall in walls(3)]

    def disagree(process: int) -> str:
        startups[process].agree({"config.cut": 1})
        with pytest.raises(InputError) as error:
            startups[process].agree(values[process])
        startups[process].close()
        return str(error.value)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(disagree, range(3))) == [message] * 3


def test_nobody_is_ready_before_all_are():
    first, last = (JointStartup(wall) for wall in walls(2))
    with ThreadPoolExecutor(1) as pool:
        ready = pool.submit(first.ready)
        with pytest.raises(TimeoutError):
            ready.result(timeout=0.05)
        last.ready()
        ready.result(timeout=60)
    first.ready()  # returns at once
    first.refuse("too late to be shared, and no reason to end the tests", status=2)


def test_alone_a_refusal_is_left_to_the_caller():
    with pytest.raises(InputError, match="in use"), shared_refusals() as startup:
        startup.agree({"config.seed": 3})
        raise InputError("--workdir", "runs/a", "in use")


def test_paths_may_differ_from_host_to_host():
    fields = {"seed": 3, "data_dir": "/a", "dataset": "npz:/a/b", "cut": 2, "progress": True}
    assert common_fields(fields) == {"config.seed": 3, "config.cut": 2}

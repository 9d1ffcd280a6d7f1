"""Signals: answered at once, and heeded by all processes at the same point."""

import contextlib
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from mocosfl_jax.run import processes, stopping
from mocosfl_jax.run.console import end
from mocosfl_jax.run.processes import say
from mocosfl_jax.run.stopping import (
    ECHO_SECONDS,
    SIGNALS,
    JointStopRequest,
    StopRequested,
    stop_requests,
)
from tests.test_processes import JOINED, ROOT, finish, start, walls

STOPPING = "stopping when the state is saved; a second signal stops at once"


@pytest.fixture(autouse=True)
def look_often(monkeypatch):
    for module in (processes, stopping):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.005)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request_and_is_announced(number, capfd):
    with stop_requests() as stop:
        assert not stop.requested()
        stop.check()
        signal.raise_signal(number)
        signal.raise_signal(number)  # at once, as `timeout` does: an echo
        assert stop.requested()
        with pytest.raises(StopRequested):
            stop.check()
    assert capfd.readouterr().err == f"mocosfl_jax: {number.name}: {STOPPING}\n"


def test_what_was_before_is_restored():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    wakeup = signal.set_wakeup_fd(-1)
    try:
        with stop_requests() as stop, contextlib.suppress(ZeroDivisionError):
            _ = 1 / 0
        threads = threading.active_count()
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
        assert not stop.requested()
        assert signal.set_wakeup_fd(-1) == -1
        assert threads == threading.active_count()
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.set_wakeup_fd(wakeup)


def test_outside_the_main_thread_nothing_is_installed():
    before = [signal.getsignal(number) for number in SIGNALS]

    def look() -> bool:
        with stop_requests() as stop:
            assert [signal.getsignal(number) for number in SIGNALS] == before
            return stop.requested()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(look).result() is False


COMPILING = """
import sys
import jax, jax.numpy as jnp
from mocosfl_jax.run.stopping import stop_requests

def unrolled(x):
    for i in range(int(sys.argv[1])):
        x = jnp.sin(x @ x + i).T
    return x

lowered = jax.jit(unrolled).lower(jnp.ones((3, 3)))
with stop_requests() as stop:
    print("compiling", flush=True)
    lowered.compile()
    print("compiled", flush=True)
    print(stop.requested())
"""


def compiling(length: int) -> subprocess.Popen:
    """A process that has begun to compile so many steps; stdout and stderr are one stream."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMPILING, str(length)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "compiling\n"
    return process


def test_a_signal_is_answered_while_xla_compiles():
    process = compiling(150)
    process.terminate()
    stdout, _ = process.communicate(timeout=100)
    assert stdout == f"mocosfl_jax: SIGTERM: {STOPPING}\ncompiled\nTrue\n"
    assert process.returncode == 0


def test_a_second_signal_ends_the_process_while_xla_compiles():
    process = compiling(1000)
    process.terminate()
    assert process.stdout is not None
    assert process.stdout.readline() == f"mocosfl_jax: SIGTERM: {STOPPING}\n"
    time.sleep(ECHO_SECONDS + 0.1)
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=100)
    assert stdout == "mocosfl_jax: SIGINT again: stopped at once\n"
    assert process.returncode == 128 + signal.SIGINT


# --------------------------------------------------------------------------- several processes


@pytest.mark.parametrize("signalled", [[0], [2], [0, 1, 2]])
@pytest.mark.parametrize("seed", range(5))
def test_all_processes_stop_at_the_same_call(signalled, seed):
    """Though each is at another call when it hears of it, and none may wait for another that has
    not joined a collective."""
    stops = [JointStopRequest(wall) for wall in walls(3)]
    collective = threading.Barrier(3, timeout=60)

    def run(process: int) -> int:
        rng, common = random.Random(f"{seed} {process}"), random.Random(seed)
        for call in range(10_000):
            if common.random() < 0.2:
                collective.wait()
            if rng.random() < 0.1:
                time.sleep(0.002)
            if call == 50 and process in signalled:
                stops[process].came = signal.SIGINT
            if stops[process].requested():
                assert stops[process].requested()
                return call
        raise AssertionError("never stopped")

    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(run, range(3))
    assert others == [first, first]
    assert first >= 50
    for stop in stops:
        stop.close()


def test_a_process_that_has_ended_does_not_hold_up_the_others():
    """It was told no at its 5 calls, and so are they."""
    ended, going = (JointStopRequest(wall) for wall in walls(2))
    assert [ended.requested() for _ in range(5)] == [False] * 5
    assert [going.requested() for _ in range(2)] == [False] * 2
    ended.close()
    going.came = signal.SIGTERM
    going._watcher.join(timeout=60)
    assert [going.requested() for _ in range(5)] == [False] * 3 + [True] * 2
    going.close()


def test_a_process_that_has_died_is_not_waited_for_forever(monkeypatch):
    monkeypatch.setattr(stopping, "AGREEMENT_SECONDS", 0.05)
    wall, _ = walls(2)
    stop = JointStopRequest(wall)
    assert not stop.requested()
    stop.came = signal.SIGTERM
    stop._watcher.join(timeout=60)
    assert stop.requested()
    stop.close()


LOOPING = f"""{JOINED}
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from mocosfl_jax.run.stopping import stop_requests

with processes.shared_refusals() as startup:
    startup.agree({{"config.seed": 3}})
    startup.ready()
devices = jax.devices()
mesh = Mesh(np.array(devices), "x")
add = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "x"), mesh=mesh, in_specs=P("x"),
                            out_specs=P()))
shape, sharding = (len(devices),), NamedSharding(mesh, P("x"))
ones = jax.make_array_from_callback(shape, sharding, lambda part: np.ones(shape)[part])
with stop_requests() as stop:
    print("looping", flush=True)
    iteration = 0
    while not stop.requested():
        time.sleep(0.01 * process)
        total, iteration = add(ones).block_until_ready(), iteration + 1
    print(total, iteration)
"""


def test_two_processes_stop_at_the_same_iteration():
    running = start(LOOPING, 2)
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "looping\n", process.communicate()
    running[1].send_signal(signal.SIGINT)
    (status_0, out_0, err_0), (status_1, out_1, err_1) = finish(running)
    assert (status_0, status_1) == (0, 0), err_0 + err_1
    total, _ = last = out_0.splitlines()[-1].split()  # before it, Gloo speaks
    assert total == "[4.]"
    assert last == out_1.splitlines()[-1].split()
    assert err_0 == f"mocosfl_jax: SIGINT on process 1: {STOPPING}\n"
    assert err_1 == f"mocosfl_jax: SIGINT: {STOPPING}\n"


@pytest.mark.parametrize(
    ("speak", "line"),
    [
        (lambda: end("mocosfl_jax.sweep", "stopped", 143), "mocosfl_jax.sweep: stopped\n"),
        (lambda: say("SIGTERM: stopping"), "mocosfl_jax: SIGTERM: stopping\n"),
    ],
)
def test_a_line_is_one_write(monkeypatch, speak, line):
    """Two threads that speak at once would mix lines of several writes."""
    written = []
    stream = SimpleNamespace(write=written.append, flush=lambda: None)
    monkeypatch.setattr(sys, "stderr", stream)
    speak()
    assert written == [line]

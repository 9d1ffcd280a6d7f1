"""Seconds and images of a dispatch: clocked at its own end, padding not counted."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from mocosfl_jax.federated.contract import Metric
from mocosfl_jax.federated.dispatch import DispatchOutput
from mocosfl_jax.run import recorder
from mocosfl_jax.run.checkpoint import Clock
from mocosfl_jax.run.progress import Progress
from mocosfl_jax.run.recorder import NonFiniteError, Recorder


class Notes:
    def __init__(self):
        self.lines = []

    def add(self, step, **values):
        self.lines.append((step, values))


@pytest.fixture
def ended(monkeypatch):
    """When each dispatch ends, whatever the loop is doing then."""
    times: list[float] = []
    monkeypatch.setattr(recorder, "_when_ready", lambda output: times.pop(0))
    return times


def dispatch(step: int, mask: list[list[list[int]]]) -> SimpleNamespace:
    round_ends = {"begins_round": step == 0, "ends_round": False}
    return SimpleNamespace(round=0, step=step, mask=np.array(mask, bool), **round_ends)


def output(*loss: float, finite: bool = True, **metrics: Metric) -> DispatchOutput:
    """Losses as means over two rows, and other metrics of each step."""
    steps = len(loss)
    rates = np.linspace(0.5, 0.25, steps, dtype=np.float32)
    means = {"loss": Metric(2 * np.array(loss), np.full(steps, 2.0))}
    return DispatchOutput({**means, **metrics}, rates, np.array(finite))


FULL, HALF = [[1, 1], [1, 1]], [[1, 0], [1, 1]]  # two clients of two images; one has only one


def make(clock: Clock) -> tuple[Recorder, Notes]:
    notes = Notes()
    speaker = Progress(SimpleNamespace(total_steps=9, progress=False), speaks=False)
    return Recorder(notes, clock, speaker), notes


def test_each_dispatch_takes_from_the_end_of_the_one_before_to_its_own(ended):
    """Also where launching the second one held up the loop until it had ended."""
    clock = Clock(train_seconds=100.0, trained_images=7)
    settled, notes = make(clock)
    start = time.monotonic()
    settled.start_lap()
    ended += [start + 2.0, start + 2.5]
    settled.push(dispatch(0, [FULL, HALF]), output(3.0, 2.0))
    settled.push(dispatch(2, [HALF]), output(1.0))
    settled.drain()
    settled.close()
    assert [step for step, _ in notes.lines] == [1, 2, 3]
    speeds = [values["images_per_second"] for _, values in notes.lines]
    np.testing.assert_allclose(speeds, [7 / 2.0, 7 / 2.0, 3 / 0.5], rtol=1e-2)
    assert [values["learning_rate"] for _, values in notes.lines] == [0.5, 0.25, 0.5]
    assert clock.train_seconds == pytest.approx(102.5, abs=0.01)
    assert clock.trained_images == 7 + 7 + 3


def test_metrics_are_divided_and_logged_where_they_have_a_weight(ended):
    ended += [time.monotonic()]
    settled, notes = make(Clock())
    rare = Metric(np.array([0.0, 3.0, 0.0]), np.array([0.0, 4.0, 0.0]))
    settled.push(dispatch(0, [FULL] * 3), output(3.0, 2.0, 1.0, rare=rare))
    settled.drain()
    settled.close()
    assert [values["loss"] for _, values in notes.lines] == [3.0, 2.0, 1.0]
    assert [values.get("rare") for _, values in notes.lines] == [None, 0.75, None]


def test_what_is_not_finite_is_not_logged(ended):
    ended += [time.monotonic()] * 2
    settled, notes = make(Clock())
    settled.push(dispatch(4, [FULL, FULL]), output(1.0, np.nan))
    with pytest.raises(NonFiniteError, match="the loss of step 6 is nan"):
        settled.drain()
    settled.push(dispatch(4, [FULL, FULL]), output(1.0, 1.0, finite=False))
    with pytest.raises(NonFiniteError, match="after step 6"):
        settled.drain()
    settled.close()
    assert notes.lines == []


def test_a_clock_that_counted_padding_starts_its_pace_anew():
    """Version 0.1.0 stored no such field."""
    old = {"wall_seconds": 9.0, "train_seconds": 5.0, "trained_images": 50}
    assert Clock.from_json(old) == Clock(wall_seconds=9.0)
    new = {**old, "counts_padding": False}
    assert Clock.from_json(new).trained_images == 50


def test_time_left_is_the_pace_since_the_first_dispatch(monkeypatch, capsys):
    """Not since the start, which lies before the compilation."""
    now = [1000.0]
    monkeypatch.setattr("mocosfl_jax.run.progress.time.monotonic", lambda: now[0])
    shown = Progress(SimpleNamespace(total_steps=8, progress=True), speaks=True)
    shown.start(0)
    now[0] += 500  # compiling
    for seconds in (0, 30, 60):
        now[0] += seconds
        shown.advance(2, 1.5, 10.0)
    lines = capsys.readouterr().out.splitlines()
    assert "left" not in lines[0]
    assert lines[-1].endswith("10 images/s, 00:45 left")  # 4 steps in 90 s: 2 more

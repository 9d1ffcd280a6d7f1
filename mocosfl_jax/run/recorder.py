"""Logs, clocks and checks dispatches, one behind the device so that it never idles."""

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from mocosfl_jax.federated.contract import Metric
from mocosfl_jax.federated.dispatch import DispatchOutput
from mocosfl_jax.run.clock import Clock
from mocosfl_jax.run.feed import Dispatch
from mocosfl_jax.run.ledger import Ledger
from mocosfl_jax.run.metrics import Line, Metrics
from mocosfl_jax.run.progress import Progress


class NonFiniteError(ArithmeticError):
    """Training diverged; the message names the step."""


class CollapseError(ArithmeticError):
    """All images have got the same embedding; the message names the round."""


AT_CHANCE = 1e-3
"""Part of the loss at chance by which that of a collapsed network may differ."""


class _Pending(NamedTuple):
    """A dispatch that may still run. status: of its round, an index. ready: when all of its outputs
    were there, monotonic."""

    dispatch: Dispatch
    output: DispatchOutput
    status: int
    ready: Future[float]


class Recorder:
    """Settles each dispatch while the next one runs.

    A dispatch takes from the end of the one before, or from `start_lap`, to its own end, which a
    thread waits for: the loop itself may be held up by launching the next one.
    """

    def __init__(
        self,
        metrics: Metrics,
        clock: Clock,
        progress: Progress,
        chance: float | None = None,
        ledger: Ledger | None = None,
    ):
        """Args: chance: `Method.chance`. ledger: of a method with statuses."""
        self._ledger = ledger
        self._metrics, self._clock, self._progress = metrics, clock, progress
        self._chance, self._at_chance, self._collapsed = chance, False, ""
        self._watch = ThreadPoolExecutor(max_workers=1)
        self._pending: _Pending | None = None
        self._lap = time.monotonic()

    def start_lap(self) -> None:
        """Leaves out of the training time what was done since the last dispatch."""
        self._lap = time.monotonic()

    def push(self, dispatch: Dispatch, output: DispatchOutput, status: int = 0) -> None:
        """Takes note of a running dispatch and settles the one before.

        Args: status: of its round, an index.
        Raises: NonFiniteError; StorageError.
        """
        ready = self._watch.submit(_when_ready, output)
        self.drain()
        self._pending = _Pending(dispatch, output, status, ready)

    def drain(self) -> None:
        """Waits for the pending dispatch, checks it and logs its steps.

        Raises: NonFiniteError; StorageError.
        """
        if self._pending is None:
            return
        (dispatch, output, status, ready), self._pending = self._pending, None
        self._lap, started = ready.result(), self._lap
        seconds = self._lap - started
        metrics = {name: _divided(metric) for name, metric in output.metrics.items()}
        rates = np.asarray(output.learning_rate)
        check_finite(dispatch.step, metrics)
        if not output.finite:
            last = dispatch.step + len(rates)
            raise NonFiniteError(f"a parameter is not finite after step {last}")
        images = int(dispatch.mask.sum())
        self._clock.train_seconds += seconds
        self._clock.trained_images += images
        sent = self._ledger.add(dispatch, status) if self._ledger else [{}] * len(rates)
        for index, rate in enumerate(rates):
            self._metrics.add(
                dispatch.step + index + 1,
                round=dispatch.round,
                **{name: values[index] for name, values in metrics.items() if index in values},
                learning_rate=float(rate),
                images_per_second=images / seconds,
                **sent[index],
            )
        losses = metrics.get("loss", {})
        self._note_losses(
            dispatch.round,
            [losses.get(index) for index in range(len(rates))],
            dispatch.begins_round,
            dispatch.ends_round,
        )
        if self._ledger:
            self._progress.status = self._ledger.statuses[status]
        self._progress.advance(len(rates), losses.get(len(rates) - 1), images / seconds)

    def check(self) -> None:
        """Raises: CollapseError: the loss was at chance in every step of a settled round."""
        if self._collapsed:
            raise CollapseError(self._collapsed)

    def recall(self, lines: dict[int, Line], step: int, steps_per_round: int) -> None:
        """Takes note of the last round that a resumed run has ended, and of the one that it is in.

        Args: lines: of metrics.jsonl, by step. step: the last one. steps_per_round: of the run.
        """
        losses = {s: lines.get(s, {}).get("loss") for s in range(1, step + 1)}
        ended, more = divmod(step, steps_per_round)
        if ended:
            last = range(step - more - steps_per_round + 1, step - more + 1)
            self._note_losses(ended - 1, [losses[s] for s in last], begins=True, ends=True)
        if more:
            begun = range(step - more + 1, step + 1)
            self._note_losses(ended, [losses[s] for s in begun], begins=True, ends=False)

    def _note_losses(
        self, round_: int, losses: list[float | None], begins: bool, ends: bool
    ) -> None:
        """Args: losses: of successive steps of a round. begins, ends: whether they are its first
        and its last ones."""
        chance = self._chance
        if chance is None:
            return
        here = all(x is not None and abs(x - chance) <= AT_CHANCE * chance for x in losses)
        self._at_chance = here and (self._at_chance or begins)
        if self._at_chance and ends:
            self._collapsed = (
                f"the loss was {chance:.4f}, that of chance, in every step of round"
                f" {round_}: the network has collapsed"
            )

    def close(self) -> None:
        self._watch.shutdown()


def _when_ready(output: DispatchOutput) -> float:
    jax.block_until_ready(output)
    return time.monotonic()


def _divided(metric: Metric) -> dict[int, float]:
    """The metric of each step of a dispatch, by its index; without those that have no weight."""
    total, weight = np.asarray(metric.total), np.asarray(metric.weight)
    return {index: float(total[index] / weight[index]) for index in np.flatnonzero(weight).tolist()}


def check_finite(first_step: int, metrics: dict[str, dict[int, float]]) -> None:
    """Raises: NonFiniteError: a metric is not finite."""
    for name, values in metrics.items():
        for index, value in values.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"the {name} of step {first_step + index + 1} is {value}")

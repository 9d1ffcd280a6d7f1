"""What a person sees while a run goes on."""

import sys
import time

from tqdm import tqdm

from mocosfl_jax.config import Resolved
from mocosfl_jax.data.dataset import Dataset, DatasetInfo
from mocosfl_jax.data.partition import ClientImages, describe
from mocosfl_jax.federated.contract import Status
from mocosfl_jax.federated.slots import Slots

SECONDS_BETWEEN_LINES = 20.0
REPORTED_ABOVE = 1.1
"""Ratio of computed to true rows above which padding is reported."""


class Progress:
    """A bar with images/s and time left on a terminal, else a line now and then; on stdout.

    status: of the round at hand; None: all rounds are alike.
    """

    def __init__(self, config: Resolved, speaks: bool):
        """speaks: whether this process is the one that prints."""
        self._speaks = speaks
        self._total = config.total_steps
        self._wanted = config.progress and speaks
        self._bar: tqdm | None = None
        self._step = 0
        self._first: tuple[int, float] | None = None  # step and time at the first dispatch's end
        self._last_line = time.monotonic()
        self.status: Status | None = None

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._speaks:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def start(self, step: int) -> None:
        """The loop starts at this step."""
        self._step, self._last_line = step, time.monotonic()
        if self._wanted and sys.stdout.isatty():
            self._bar = tqdm(total=self._total, initial=step, unit="step", file=sys.stdout)

    def advance(self, steps: int, loss: float | None, images_per_second: float) -> None:
        """So many more steps are done; loss of the last one, None if the method has none."""
        self._step += steps
        now = time.monotonic()
        numbers = f"{images_per_second:.0f} images/s"
        if self.status is not None:
            numbers = f"status {self.status.name} ({self.status.words}), {numbers}"
        if loss is not None:
            numbers = f"loss {loss:.3f}, {numbers}"
        if self._bar is not None:
            self._bar.set_postfix_str(numbers, False)
            self._bar.update(steps)
        elif self._wanted and now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.say(f"step {self._step} of {self._total}: {numbers}{self._time_left(now)}")
        self._first = self._first or (self._step, now)

    def _time_left(self, now: float) -> str:
        """From the pace since the first dispatch ended, so that compilation is left out."""
        if self._first is None:
            return ""
        step, started = self._first
        pace = (now - started) / (self._step - step)
        return f", {tqdm.format_interval(pace * (self._total - self._step))} left"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def describe_data(progress: Progress, partition: ClientImages, dataset: Dataset) -> None:
    """Says what was read, and who holds it."""
    info = dataset.info
    progress.say(f"data: {info.num_train:,} training and {info.num_test:,} test images{_of(info)}")
    if info.num_mixed:
        progress.say(f"mixed in: {info.num_mixed:,} training images of a second data set")
    facts = describe(partition, dataset.train.labels, dataset.info.num_classes)
    progress.say("partition: " + ", ".join(f"{name} {value}" for name, value in facts.items()))


def _of(info: DatasetInfo) -> str:
    """What is known of the classes, and of where the test images come from."""
    names = info.class_names or ()
    shown = f" ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})" if names else ""
    classes = f" of {info.num_classes} classes{shown}" if info.num_classes else ", without labels"
    return f"{classes}; the test images are held out" if info.held_out else classes


def padding_line(slots: Slots, devices: int) -> str | None:
    """What a person is told of the padding of a step; None: it is little."""
    computed, true = slots.computed_blocks, slots.true_blocks
    if computed <= REPORTED_ABOVE * true:
        return None
    chunks = slots.parts // devices
    parts = f"{devices} devices" if devices > 1 else "1 device"
    parts += f" with {chunks} chunks each" if chunks > 1 else ""
    uneven = [str(group.clients) for group in slots.groups if group.clients % slots.parts]
    return (
        f"padding: a step computes {computed} batches, {true} of them of clients"
        f" ({computed / true:.2f} times as many): {parts} cannot share {' and '.join(uneven)}"
        " clients evenly"
    )

"""The images of each dispatch, gathered on the host one dispatch ahead of the device."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from mocosfl_jax.config import Resolved
from mocosfl_jax.data.cohort import CohortSampler, round_batches
from mocosfl_jax.data.partition import ClientImages
from mocosfl_jax.federated.state import PADDING

Item = TypeVar("Item")
Placed = TypeVar("Placed")


class Dispatch(NamedTuple):
    """Steps [step, step + S) of a run; NumPy arrays over the slots C', of which the first C have a
    client and the rest are padding.

    cohort: (C',) int32 client ids, `PADDING` for padding. image_ids: (S, C', B) int32. mask:
    (S, C', B) bool, False for padding. sync: (S,) bool. weight: (C',) float32, 0 for padding.
    begins_round, ends_round: whether it is the first or the last dispatch of round `round`.
    """

    round: int
    step: int
    cohort: np.ndarray
    image_ids: np.ndarray
    mask: np.ndarray
    sync: np.ndarray
    weight: np.ndarray
    begins_round: bool
    ends_round: bool


def dispatches(
    config: Resolved, partition: ClientImages, sampler: CohortSampler, slots: int, start_step: int
) -> Iterator[Dispatch]:
    """All dispatches from a step on; a function of the config and the step alone.

    Each has `steps_per_dispatch` steps; only a round that was begun with another value of it may
    end with a shorter one.

    Args:
      partition, sampler: who holds which images, and who is drawn.
      slots: C', at least the cohort.
      start_step: steps taken before.
    """
    size = config.steps_per_dispatch
    sync_steps = np.array(config.sync_steps)
    padding = [(0, slots - config.cohort_size)]
    first_round, offset = divmod(start_step, config.steps_per_round)
    for round_ in range(first_round, config.rounds):
        drawn = sampler.draw(round_)
        image_ids, mask = round_batches(
            partition, drawn, round_, config.seed, config.batch_size, config.steps_per_round
        )
        image_ids = np.pad(image_ids, [(0, 0), *padding, (0, 0)])
        mask = np.pad(mask, [(0, 0), *padding, (0, 0)])
        weight = partition.sizes[drawn] if config.sync_weights == "size" else np.ones(len(drawn))
        cohort = np.pad(drawn, padding, constant_values=PADDING)
        for start in range(offset, config.steps_per_round, size):
            steps = slice(start, min(start + size, config.steps_per_round))
            yield Dispatch(
                round=round_,
                step=round_ * config.steps_per_round + start,
                cohort=cohort,
                image_ids=image_ids[steps],
                mask=mask[steps],
                sync=sync_steps[steps],
                weight=np.pad(weight, padding).astype(np.float32),
                begins_round=start == 0,
                ends_round=steps.stop == config.steps_per_round,
            )
        offset = 0


def prefetch(items: Iterator[Item], place: Callable[[Item], Placed]) -> Iterator[Placed]:
    """Yields place(item) for each item, one item ahead in a thread."""
    with ThreadPoolExecutor(max_workers=1) as pool:

        def take() -> Placed | None:
            item = next(items, None)
            return None if item is None else place(item)

        ahead = pool.submit(take)
        while (item := ahead.result()) is not None:
            ahead = pool.submit(take)
            yield item

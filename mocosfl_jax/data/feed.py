"""The images of each dispatch, gathered on the host one dispatch ahead of the device."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from mocosfl_jax.config import Config
from mocosfl_jax.core.dispatch import Images
from mocosfl_jax.data.cohort import CohortSampler, round_batches
from mocosfl_jax.data.partition import Partition

Item = TypeVar("Item")


class Dispatch(NamedTuple):
    """Steps [step, step + S) of a run.

    cohort: (C,) int32 client ids. inputs: NumPy arrays. begins_round, ends_round: whether it is the
    first or the last dispatch of round `round`.
    """

    round: int
    step: int
    cohort: np.ndarray
    inputs: Images
    begins_round: bool
    ends_round: bool


def dispatches(
    config: Config,
    images: np.ndarray,
    partition: Partition,
    sampler: CohortSampler,
    start_step: int,
) -> Iterator[Dispatch]:
    """All dispatches from a step on; a function of the config and the step alone.

    Each has `steps_per_dispatch` steps; only a round that was begun with another value of it may
    end with a shorter one.

    Args:
      images: uint8 (n, H, W, 3), the train split.
      partition, sampler: who holds which images, and who is drawn.
      start_step: steps taken before.
    """
    size = config.steps_per_dispatch
    sync_steps = np.array(config.sync_steps)
    first_round, offset = divmod(start_step, config.steps_per_round)
    for round_ in range(first_round, config.rounds):
        cohort = sampler.draw(round_)
        image_ids, mask = round_batches(
            partition, cohort, round_, config.seed, config.batch_size, config.steps_per_round
        )
        weight = partition.sizes[cohort] if config.sync_weights == "size" else np.ones(len(cohort))
        for start in range(offset, config.steps_per_round, size):
            steps = slice(start, min(start + size, config.steps_per_round))
            inputs = Images(
                images=images[image_ids[steps]],
                mask=mask[steps],
                sync_now=sync_steps[steps],
                sync_weight=weight.astype(np.float32),
            )
            yield Dispatch(
                round=round_,
                step=round_ * config.steps_per_round + start,
                cohort=cohort,
                inputs=inputs,
                begins_round=start == 0,
                ends_round=steps.stop == config.steps_per_round,
            )
        offset = 0


def prefetch(items: Iterator[Item], place: Callable[[Item], Item]) -> Iterator[Item]:
    """Yields place(item) for each item, one item ahead in a thread."""
    with ThreadPoolExecutor(max_workers=1) as pool:

        def take() -> Item | None:
            item = next(items, None)
            return None if item is None else place(item)

        ahead = pool.submit(take)
        while (item := ahead.result()) is not None:
            ahead = pool.submit(take)
            yield item

"""The images of each dispatch, gathered on the host one dispatch ahead of the device."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from mocosfl_jax.config import Resolved
from mocosfl_jax.config.data import mixed_partition_of, sampler_of
from mocosfl_jax.config.rich import groups_of
from mocosfl_jax.data.cohort import CohortSampler, round_batches
from mocosfl_jax.data.dataset import DatasetInfo
from mocosfl_jax.data.partition import ClientImages, Partition
from mocosfl_jax.federated.slots import Slots, spread
from mocosfl_jax.federated.state import PADDING
from mocosfl_jax.randomness import Stream

Item = TypeVar("Item")
Placed = TypeVar("Placed")


class Dispatch(NamedTuple):
    """Steps [step, step + S) of a run; NumPy arrays over the slots C', of which C have a client and
    the rest are padding. Where some clients take larger batches, image_ids, mixed_ids and mask have
    their rows as `federated.contract.Batch` has.

    cohort: (C',) int32 client ids, `PADDING` for padding. image_ids: (S, C', B) int32. mixed_ids:
    (S, C', M) int32, images of the second data set, M = 0 without one. mask: (S, C', B + M) bool,
    False for padding. sync: (S,) bool. weight: (C',) float32, 0 for padding. begins_round,
    ends_round: whether it is the first or the last dispatch of round `round`.
    """

    round: int
    step: int
    cohort: np.ndarray
    image_ids: np.ndarray
    mixed_ids: np.ndarray
    mask: np.ndarray
    sync: np.ndarray
    weight: np.ndarray
    begins_round: bool
    ends_round: bool


def dispatches(
    config: Resolved,
    partition: ClientImages,
    sampler: CohortSampler,
    slots: Slots,
    start_step: int,
    mixed: Partition | None = None,
) -> Iterator[Dispatch]:
    """All dispatches from a step on; a function of the config and the step alone.

    Each has `steps_per_dispatch` steps; only a round that was begun with another value of it may
    end with a shorter one.

    Args:
      partition, sampler: who holds which images, and who is drawn.
      slots: of the cohort.
      start_step: steps taken before.
      mixed: who holds which images of the second data set; None: there is none.
    """
    size = config.steps_per_dispatch
    sync_steps = np.array(config.sync_steps)
    by_size = config.sync_weights == "size"
    first_round, offset = divmod(start_step, config.steps_per_round)
    for round_ in range(first_round, config.rounds):
        drawn = sampler.draw(round_)
        image_ids, mixed_ids, mask = (
            spread(x, slots.blocks, axis=1)
            for x in _round_of(config, partition, mixed, drawn, round_)
        )
        weight = _sizes(partition, mixed, drawn) if by_size else np.ones(len(drawn))
        cohort = spread(drawn, slots.clients, fill=PADDING)
        for start in range(offset, config.steps_per_round, size):
            steps = slice(start, min(start + size, config.steps_per_round))
            yield Dispatch(
                round=round_,
                step=round_ * config.steps_per_round + start,
                cohort=cohort,
                image_ids=image_ids[steps],
                mixed_ids=mixed_ids[steps],
                mask=mask[steps],
                sync=sync_steps[steps],
                weight=spread(weight, slots.clients).astype(np.float32),
                begins_round=start == 0,
                ends_round=steps.stop == config.steps_per_round,
            )
        offset = 0


def most_draws(config: Resolved, info: DatasetInfo, partition: ClientImages) -> int:
    """How often the most often drawn image is drawn in the whole run; it takes a while."""
    mixed = mixed_partition_of(config, info)
    sampler = sampler_of(config, partition)
    draws, mixed_draws = np.zeros(info.num_train, int), np.zeros(info.num_mixed, int)
    for round_ in range(config.rounds):
        ids, mixed_ids, mask = _round_of(config, partition, mixed, sampler.draw(round_), round_)
        first, second = np.split(mask, [ids.shape[-1]], axis=-1)
        draws += np.bincount(ids[first], minlength=info.num_train)
        mixed_draws += np.bincount(mixed_ids[second], minlength=info.num_mixed)
    return int(max(draws.max(), mixed_draws.max(initial=0)))


def _round_of(
    config: Resolved,
    partition: ClientImages,
    mixed: Partition | None,
    cohort: np.ndarray,
    round_: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image ids, ids of the second data set and the mask of both, for all steps of a round, in the
    blocks of the cohort."""
    ids, mask = _blocks(config, partition, cohort, round_, config.batch_size, Stream.ORDER)
    if mixed is None:
        return ids, ids[..., :0], mask
    rows = config.images_a_step - config.batch_size
    mixed_ids, mixed_mask = _blocks(config, mixed, cohort, round_, rows, Stream.MIXTURE_ORDER)
    return ids, mixed_ids, np.concatenate([mask, mixed_mask], axis=-1)


def _blocks(
    config: Resolved,
    partition: ClientImages,
    cohort: np.ndarray,
    round_: int,
    size: int,
    stream: Stream,
) -> tuple[np.ndarray, np.ndarray]:
    """Image ids and their mask, (steps, blocks, size): each group's batches, cut into blocks."""
    steps, parts, first = config.steps_per_round, [], 0
    for group in groups_of(config):
        members = cohort[first : first + group.clients]
        first += group.clients
        batches = round_batches(
            partition, members, round_, config.seed, group.blocks * size, steps, stream
        )
        parts.append([x.reshape(steps, -1, size) for x in batches])
    ids, mask = (np.concatenate(x, axis=1) for x in zip(*parts, strict=True))
    return ids, mask


def _sizes(partition: ClientImages, mixed: Partition | None, cohort: np.ndarray) -> np.ndarray:
    """Images of each of these clients, (C,)."""
    sizes = partition.sizes[cohort]
    return sizes if mixed is None else sizes + mixed.sizes[cohort]


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

import itertools

import jax
import numpy as np
import pytest

from mocosfl_jax.data.cohort import CohortSampler, Draw, client_order, draw_cohort, round_batches
from mocosfl_jax.data.partition import Partition, iid
from mocosfl_jax.errors import InputError
from mocosfl_jax.randomness import Stream, device_key, host_rng

# Clients of 5, 0, 2, 12 and 1 images, whose ids are not in order.
SIZES = (5, 0, 2, 12, 1)
PARTITION = Partition(
    np.concatenate([[0], np.cumsum(SIZES)]),
    np.random.default_rng(0).permutation(sum(SIZES)).astype(np.int32),
)


def test_cohort_is_drawn_among_clients_with_images():
    sampler = CohortSampler(PARTITION, 3, seed=1)
    cohorts = [sampler.draw(round_) for round_ in range(60)]
    for cohort in cohorts:
        assert cohort.dtype == np.int32
        assert len(set(cohort.tolist())) == 3
        assert 1 not in cohort
    seen = {tuple(sorted(cohort)) for cohort in cohorts}
    assert seen == set(itertools.combinations((0, 2, 3, 4), 3))


def test_cohort_depends_on_seed_and_round_only():
    partition = iid(5000, 1000, 0)
    first, same = (CohortSampler(partition, 10, seed=1) for _ in range(2))
    same.draw(0)  # drawing leaves no trace
    np.testing.assert_array_equal(first.draw(7), same.draw(7))
    assert set(first.draw(7)) != set(first.draw(8))
    assert set(first.draw(7)) != set(CohortSampler(partition, 10, seed=2).draw(7))


def test_all_clients_take_part_in_id_order():
    assert CohortSampler(PARTITION, 4, seed=1).draw(9).tolist() == [0, 2, 3, 4]


def test_cohorts_are_uniform():
    eligible = np.arange(100, 120, dtype=np.int32)
    drawn = np.concatenate([draw_cohort(eligible, 5, 0, round_) for round_ in range(2000)])
    counts = np.bincount(drawn - 100, minlength=20)
    # Binomial(2000, 1/4): deviation 19.4; 4.5 of them for the largest of 20.
    assert np.abs(counts - 500).max() < 4.5 * np.sqrt(2000 * 0.25 * 0.75)


def test_each_round_draws_as_many_rich_clients():
    """Two of clients 0, 2 and 3, and one of 4 and 5, one kind whatever is drawn of the other."""
    partition = Partition(np.cumsum([0, 1, 0, 1, 1, 1, 1]), np.arange(5, dtype=np.int32))
    sampler = CohortSampler(partition, Draw(3, rich=2, rich_ids=4), seed=1)
    cohorts = [sampler.draw(round_) for round_ in range(200)]
    assert all(cohort.dtype == np.int32 and cohort.shape == (3,) for cohort in cohorts)
    seen = {(frozenset(cohort[:2].tolist()), int(cohort[2])) for cohort in cohorts}
    rich = map(frozenset, [(0, 2), (0, 3), (2, 3)])
    assert seen == set(itertools.product(rich, (4, 5)))
    everyone = CohortSampler(partition, Draw(5, rich=3, rich_ids=4), seed=1)
    assert everyone.draw(0).tolist() == [0, 2, 3, 4, 5]


@pytest.mark.parametrize(("draw", "words"), [(Draw(3, 3, 3), "3 rich"), (Draw(3, 1, 3), "2 other")])
def test_too_few_clients_of_a_kind_are_refused(draw, words):
    partition = Partition(np.cumsum([0, 1, 0, 1, 1]), np.arange(3, dtype=np.int32))
    with pytest.raises(InputError, match=rf"^config.cohort_size = 3: {words} clients are drawn"):
        CohortSampler(partition, draw, seed=1)


@pytest.mark.parametrize("cohort_size", [0, 5])
def test_cohort_size_is_checked(cohort_size):
    with pytest.raises(InputError, match=r"^config.cohort_size = .* 4$"):
        CohortSampler(PARTITION, cohort_size, seed=1)


def test_client_walks_through_permutations():
    """12 images in batches of 5: batches 2 and 4 straddle; each dozen is a permutation."""
    ids, mask = client_order(PARTITION, 3, round_=2, seed=1, batch_size=5, steps=8)
    assert ids.shape == mask.shape == (8, 5)
    assert (ids.dtype, mask.dtype) == (np.int32, np.bool_)
    assert mask.all()
    walk = ids.reshape(-1)
    dozens = [walk[:12], walk[12:24], walk[24:36]]
    for dozen in dozens:
        assert sorted(dozen) == sorted(PARTITION.client(3))
    assert not np.array_equal(dozens[0], dozens[1])
    assert len(set(walk[36:])) == 4


def test_small_client_takes_all_images_each_step():
    ids, mask = client_order(PARTITION, 0, round_=2, seed=1, batch_size=7, steps=6)
    own = PARTITION.client(0)
    assert mask.tolist() == [[True] * 5 + [False] * 2] * 6
    for step in ids:
        assert sorted(step[:5]) == sorted(own)
        assert step[5:].tolist() == [own[0]] * 2
    assert len({tuple(step) for step in ids}) > 1


def test_client_with_exactly_a_batch_is_not_padded():
    ids, mask = client_order(PARTITION, 0, round_=2, seed=1, batch_size=5, steps=3)
    assert mask.all()
    for step in ids:
        assert sorted(step) == sorted(PARTITION.client(0))


def test_order_depends_on_round_client_and_seed():
    def order(round_=2, seed=1, client=3):
        return client_order(PARTITION, client, round_, seed, 4, 6)[0].tolist()

    assert order() == order()
    assert order() != order(round_=3)
    assert order() != order(seed=2)
    twins = Partition(np.array([0, 12, 24]), np.tile(PARTITION.client(3), 2))
    first, second = (client_order(twins, client, 2, 1, 4, 6)[0].tolist() for client in (0, 1))
    assert first != second


def test_more_steps_extend_the_walk():
    short, long = (client_order(PARTITION, 3, 2, 1, 5, steps)[0] for steps in (4, 9))
    np.testing.assert_array_equal(long[:4], short)


def test_round_batches_puts_clients_in_cohort_order():
    cohort = np.array([3, 0, 4], np.int32)
    ids, mask = round_batches(PARTITION, cohort, 2, 1, batch_size=6, steps=4)
    assert ids.shape == mask.shape == (4, 3, 6)
    for slot, client in enumerate(cohort):
        expected = client_order(PARTITION, int(client), 2, 1, 6, 4)
        np.testing.assert_array_equal(ids[:, slot], expected[0])
        np.testing.assert_array_equal(mask[:, slot], expected[1])


def test_empty_client_cannot_take_part():
    with pytest.raises(InputError, match=r"^client = 1: "):
        client_order(PARTITION, 1, 0, 0, 2, 1)


def test_host_streams_differ_in_every_coordinate():
    """Zeros and large ids too, which a plain seed sequence would confuse."""
    coordinates = [
        (1, Stream.ORDER),
        (1, Stream.ORDER, 0),
        (1, Stream.ORDER, 0, 0),
        (0, Stream.ORDER, 1),
        (1, Stream.COHORT, 0),
        (1, Stream.ORDER, 0, 2**32),
        (1, Stream.ORDER, 1, 0),
        (1, Stream.ORDER, 0, 1),
        (2**32 - 1, Stream.ORDER, 0),
    ]
    draws = {host_rng(*c).random() for c in coordinates}
    assert len(draws) == len(coordinates)
    assert host_rng(*coordinates[0]).random() in draws


def test_device_keys_differ_by_seed_and_stream():
    keys = [device_key(seed, stream) for seed in (0, 1, 2**32 - 1) for stream in Stream]
    assert all(jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) for key in keys)
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == 3 * len(Stream)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_is_checked(seed):
    for make in (host_rng, device_key):
        with pytest.raises(InputError, match=r"^config.seed = "):
            make(seed, Stream.INIT)

import itertools
import math

import numpy as np
import pytest

from mocosfl_jax.data.cohort import CohortSampler
from mocosfl_jax.data.partition import (
    Partition,
    SharedImages,
    by_classes,
    describe,
    dirichlet,
    iid,
)
from mocosfl_jax.errors import InputError

# Unequal classes, not sorted, none of the sizes a multiple of another.
COUNTS = (31, 7, 50, 19)
LABELS = np.random.default_rng(3).permutation(np.repeat(np.arange(4), COUNTS))
NUM_IMAGES = len(LABELS)

PARTITIONS = {
    "iid": lambda seed: iid(NUM_IMAGES, 9, seed),
    "by_classes": lambda seed: by_classes(LABELS, 9, 3, seed),
    "dirichlet": lambda seed: dirichlet(LABELS, 9, 0.3, seed),
}


def class_counts(partition, labels, num_classes):
    """Images of each class at each client, (N, num_classes)."""
    clients = [labels[partition.client(i)] for i in range(partition.num_clients)]
    return np.array([[np.sum(held == k) for k in range(num_classes)] for held in clients])


@pytest.mark.parametrize("kind", PARTITIONS)
def test_every_image_belongs_to_exactly_one_client(kind):
    partition = PARTITIONS[kind](5)
    assert partition.num_clients == 9
    assert partition.offsets.dtype == np.int64
    assert partition.indices.dtype == np.int32
    assert partition.offsets[0] == 0
    assert partition.offsets[-1] == NUM_IMAGES
    held = [image for client in range(9) for image in partition.client(client)]
    assert sorted(held) == list(range(NUM_IMAGES))
    assert [len(partition.client(i)) for i in range(9)] == partition.sizes.tolist()


def test_holders_are_the_clients_that_have_images():
    partition = dirichlet(LABELS, 9, 0.01, seed=5)
    held = [client for client in range(9) if len(partition.client(client))]
    assert 1 < partition.num_holders == len(held) < 9
    shared = SharedImages(NUM_IMAGES, LABELS, 10**12, 5, None, 0.01, 5)  # counts without a list
    assert shared.num_holders == 10**12


@pytest.mark.parametrize("kind", PARTITIONS)
def test_seed_decides(kind):
    first, same, other = (PARTITIONS[kind](seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.indices, same.indices)
    np.testing.assert_array_equal(first.offsets, same.offsets)
    assert not np.array_equal(first.indices, other.indices)


def test_iid_sizes_differ_by_one_at_most():
    sizes = iid(NUM_IMAGES, 9, 0).sizes
    assert sizes.max() - sizes.min() == 1
    assert iid(9, 9, 0).sizes.tolist() == [1] * 9


def test_by_classes_deals_shards_of_the_sorted_images():
    """A plain loop cuts the sorted labels; the clients' labels must be a deal of those shards."""
    num_clients, per_client = 9, 3
    num_shards = num_clients * per_client
    ordered = sorted(LABELS.tolist())
    cuts = [NUM_IMAGES * i // num_shards for i in range(num_shards + 1)]
    shards = [tuple(ordered[a:b]) for a, b in itertools.pairwise(cuts)]
    assert {len(shard) for shard in shards} == {3, 4}

    partition = by_classes(LABELS, num_clients, per_client, 5)
    left = sorted(shards)
    for client in range(num_clients):
        labels = LABELS[partition.client(client)].tolist()
        for _ in range(per_client):
            # A client's labels are its shards end to end.
            shard = next(tuple(labels[:n]) for n in (4, 3) if tuple(labels[:n]) in left)
            left.remove(shard)
            labels = labels[len(shard) :]
        assert not labels
    assert not left


def test_by_classes_limits_the_classes_of_a_client():
    labels = np.arange(1000) % 10
    facts = describe(by_classes(labels, 25, 2, 1), labels, 10)
    assert facts["images_min"] == facts["images_max"] == 40
    assert facts["classes_max"] == 2  # 20 images a shard divide the 100 of a class


def test_by_classes_shuffles_within_a_class():
    labels = np.zeros(100, int)
    labels[50:] = 1
    first = np.sort(by_classes(labels, 10, 1, 0).client(0))
    assert np.ptp(first) > len(first)


def test_dirichlet_follows_the_drawn_proportions(monkeypatch):
    """With known proportions, shares are exact to within one image."""
    proportions = np.array([0.5, 0.0, 0.27, 0.23])
    monkeypatch.setattr(
        "mocosfl_jax.data.partition.host_rng", lambda *_: _FixedProportions(proportions)
    )
    counts = class_counts(dirichlet(LABELS, 4, 0.7, 0), LABELS, 4)
    assert np.abs(counts - proportions[:, None] * np.array(COUNTS)).max() <= 1
    assert counts[1].sum() == 0
    np.testing.assert_array_equal(counts.sum(axis=0), COUNTS)


class _FixedProportions:
    def __init__(self, proportions):
        self._proportions = proportions

    def dirichlet(self, alpha):
        assert alpha.tolist() == [0.7] * len(self._proportions)
        return self._proportions

    def permutation(self, length):
        return np.arange(length)[::-1]


def test_dirichlet_alpha_sets_the_skew():
    labels = np.arange(20_000) % 10
    mean_classes = [
        describe(dirichlet(labels, 20, alpha, 0), labels, 10)["classes_mean"]
        for alpha in (0.01, 0.3, 100.0)
    ]
    assert mean_classes[0] < 3 < mean_classes[1] < mean_classes[2] == 10
    counts = class_counts(dirichlet(labels, 20, 1e4, 0), labels, 10)
    assert np.abs(counts - 100).max() < 10


def test_dirichlet_survives_extreme_alpha():
    for alpha in (1e-300, 1e-5, 1e6):
        partition = dirichlet(LABELS, 9, alpha, 0)
        assert partition.sizes.sum() == NUM_IMAGES


def test_class_counts_and_description():
    partition = Partition(np.array([0, 3, 3, 5]), np.array([4, 0, 2, 1, 3], np.int32))
    labels = np.array([2, 0, 2, 0, 1])
    assert class_counts(partition, labels, 4).tolist() == [[0, 1, 2, 0], [0] * 4, [2, 0, 0, 0]]
    assert describe(partition, labels, 4) == {
        "clients": 3,
        "empty_clients": 1,
        "images_min": 0,
        "images_median": 2.0,
        "images_max": 3,
        "classes_min": 1,
        "classes_mean": 1.5,
        "classes_max": 2,
    }
    assert "classes_min" not in describe(partition, None, None)


def test_client_is_a_view_and_ids_are_checked():
    partition = iid(10, 4, 0)
    assert np.shares_memory(partition.client(3), partition.indices)
    for client in (-1, 4):
        with pytest.raises(IndexError, match="of 4"):
            partition.client(client)


def test_a_hundred_thousand_clients():
    labels = np.arange(300_000) % 10
    for partition in (
        iid(300_000, 100_000, 0),
        by_classes(labels, 100_000, 2, 0),
        dirichlet(labels, 100_000, 0.1, 0),
    ):
        assert partition.num_clients == 100_000
        np.testing.assert_array_equal(np.sort(partition.indices), np.arange(300_000))


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: iid(10, 11, 0), "config.num_clients"),
        (lambda: iid(10, 0, 0), "config.num_clients"),
        (lambda: by_classes(LABELS, NUM_IMAGES + 1, 1, 0), "config.num_clients"),
        (lambda: dirichlet(LABELS, NUM_IMAGES + 1, 1.0, 0), "config.num_clients"),
        (lambda: by_classes(LABELS, 2, 5, 0), "config.classes_per_client"),
        (lambda: by_classes(LABELS, 2, 0, 0), "config.classes_per_client"),
        (lambda: by_classes(LABELS, 60, 2, 0), "config.classes_per_client"),
        (lambda: by_classes(None, 2, 2, 0), "config.classes_per_client"),
        (lambda: dirichlet(None, 2, 0.5, 0), "config.dirichlet_alpha"),
        (lambda: dirichlet(LABELS, 2, 0.0, 0), "config.dirichlet_alpha"),
        (lambda: dirichlet(LABELS, 2, float("inf"), 0), "config.dirichlet_alpha"),
        (lambda: dirichlet(LABELS, 2, float("nan"), 0), "config.dirichlet_alpha"),
    ],
)
def test_bad_input_names_the_field(make, field):
    with pytest.raises(InputError, match=f"^{field} = "):
        make()


# ---------------------------------------------------------------------------- shared images


def shared(clients: int = 50, images: int = 6, **fields) -> SharedImages:
    settings = {"labels": LABELS, "classes_per_client": None, "alpha": None, "seed": 3}
    return SharedImages(
        len(LABELS), **{**settings, **fields}, num_clients=clients, images_per_client=images
    )


@pytest.mark.parametrize("fields", [{}, {"classes_per_client": 2}, {"alpha": 0.3}])
def test_shared_images_depend_on_seed_and_client_alone(fields):
    few, many = shared(50, **fields), shared(1_000_000, **fields)
    other = shared(50, **{**fields, "seed": 4})
    differ = 0
    for client in (0, 7, 49):
        ids = few.client(client)
        assert ids.dtype == np.int32
        assert len(set(ids.tolist())) == 6  # none twice
        np.testing.assert_array_equal(ids, many.client(client))
        differ += not np.array_equal(ids, other.client(client))
    assert differ == 3
    assert len(many.sizes) == 1_000_000
    assert set(many.sizes[[0, 999_999]]) == {6}


def test_shared_images_of_classes_per_client():
    partition = shared(200, images=5, classes_per_client=2)
    seen = set()
    for client in range(200):
        classes, counts = np.unique(LABELS[partition.client(client)], return_counts=True)
        assert sorted(counts) == [2, 3]
        seen.add(tuple(classes))
    assert len(seen) == math.comb(len(np.unique(LABELS)), 2)  # every pair of classes occurs


def test_shared_images_of_a_skewed_client_come_from_few_classes():
    def classes(alpha: float) -> float:
        partition = shared(100, alpha=alpha)
        held = [len(np.unique(LABELS[partition.client(c)])) for c in range(100)]
        return float(np.mean(held))

    assert classes(0.05) < 1.7 < 2.3 < classes(100.0)


def test_shared_images_fill_up_from_other_classes_when_one_runs_out():
    smallest = np.bincount(LABELS).min()
    partition = shared(20, images=len(LABELS) - smallest, alpha=0.01)
    for client in range(20):
        assert len(set(partition.client(client).tolist())) == len(LABELS) - smallest


def test_shared_images_refuse_what_cannot_be_drawn():
    with pytest.raises(InputError, match=r"^config.classes_per_client = 2: .* IID"):
        shared(labels=None, classes_per_client=2)
    with pytest.raises(InputError, match=r"^config.images_per_client = .* images$"):
        shared(images=len(LABELS), classes_per_client=1)
    with pytest.raises(IndexError, match="50 of 50"):
        shared().client(50)


def test_a_million_clients_of_which_most_have_nothing():
    """The cohort is drawn among those with images; nothing is touched for the rest."""
    partition = dirichlet(np.arange(1_000_000) % 10, 1_000_000, 0.1, 0)
    sampler = CohortSampler(partition, 100, seed=0)
    cohort = sampler.draw(3)
    assert (partition.sizes[cohort] > 0).all()
    assert (partition.sizes == 0).sum() > 100_000

"""Rich clients hold their share of the images, in every kind of partition."""

import itertools

import numpy as np
import pytest

from mocosfl_jax.data.partition import RichShare, by_classes, check_rich_share, dirichlet, iid
from mocosfl_jax.errors import InputError
from tests.test_partition import COUNTS, LABELS, NUM_IMAGES, class_counts

CLIENTS, RICH, PER_CLIENT = 9, 2, 3
SHARE = RichShare(RICH, 0.6)  # 64 of 107 images
PARTITIONS = {
    "iid": lambda seed: iid(NUM_IMAGES, CLIENTS, seed, SHARE),
    "by_classes": lambda seed: by_classes(LABELS, CLIENTS, PER_CLIENT, seed, SHARE),
    "dirichlet": lambda seed: dirichlet(LABELS, CLIENTS, 0.3, seed, SHARE),
}


@pytest.mark.parametrize("kind", PARTITIONS)
def test_rich_clients_hold_their_share_and_every_image_has_one_owner(kind):
    partition = PARTITIONS[kind](5)
    held = [image for client in range(CLIENTS) for image in partition.client(client)]
    assert sorted(held) == list(range(NUM_IMAGES))
    of_rich, classes = partition.sizes[:RICH].sum(), len(COUNTS)
    if kind == "dirichlet":  # rounded class by class
        assert abs(of_rich - 0.6 * NUM_IMAGES) <= classes / 2 + 0.5
        counts = class_counts(partition, LABELS, classes)[:RICH].sum(axis=0)
        assert np.abs(counts - 0.6 * np.array(COUNTS)).max() <= 1
    else:
        assert of_rich == 64
    other = PARTITIONS[kind](6)
    assert not np.array_equal(partition.indices, other.indices)


@pytest.mark.parametrize("spread", [iid(NUM_IMAGES, CLIENTS, 0, SHARE), PARTITIONS["iid"](1)])
def test_clients_of_a_kind_hold_alike(spread):
    assert spread.sizes.tolist() == [32, 32, 6, 6, 6, 6, 6, 6, 7]


def test_shards_of_both_kinds_tile_the_sorted_images():
    """Lengths by hand: 64 images in 6 shards of the rich, 43 in 21 of the others; and the shards of
    a client are anywhere among them."""
    partition = PARTITIONS["by_classes"](5)
    lengths = [64 * (i + 1) // 6 - 64 * i // 6 for i in range(6)]
    lengths += [43 * (i + 1) // 21 - 43 * i // 21 for i in range(21)]
    shards = []
    for client in range(CLIENTS):
        labels = iter(LABELS[partition.client(client)].tolist())
        for length in lengths[PER_CLIENT * client :][:PER_CLIENT]:
            shards.append(list(itertools.islice(labels, length)))
        assert next(labels, None) is None
    assert all(shard == sorted(shard) for shard in shards)
    tiled = sorted(shards, key=lambda shard: (shard[0], shard[-1]))
    assert list(itertools.chain(*tiled)) == sorted(LABELS.tolist())
    firsts = {tuple(shard[0] for shard in shards[:6])}
    firsts |= {
        tuple(LABELS[by_classes(LABELS, CLIENTS, PER_CLIENT, s, SHARE).client(0)][:1])
        for s in range(6)
    }
    assert len(firsts) > 2


def test_shares_leave_no_client_without_images():
    check_rich_share(RichShare(2, 0.5), 11, 5)  # 6 images for 2, 5 for 3
    check_rich_share(RichShare(2, 0.5), 12, 5, per_client=2)
    for share, words in (
        (RichShare(2, 0.1), "the 2 rich clients share 1 of 11 images, and each needs at least 1"),
        (RichShare(2, 0.8), "the 3 other clients share 2 of 11 images, and each needs at least 1"),
    ):
        with pytest.raises(InputError) as error:
            check_rich_share(share, 11, 5)
        assert str(error.value) == f"config.rich.data = {share.data}: {words}"

"""Which client holds which images: one index array with offsets, for a million clients as for ten.

In a `Partition` every image belongs to exactly one client; in `SharedImages` clients draw theirs
alone. All is deterministic in the seed.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mocosfl_jax.errors import InputError
from mocosfl_jax.randomness import Stream, host_rng


class ClientImages(Protocol):
    """What training needs to know of either."""

    @property
    def num_clients(self) -> int:
        """N."""

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(N,) int64, images of each client."""

    @property
    def num_holders(self) -> int:
        """Clients that have images."""

    def client(self, client_id: int) -> NDArray[np.int32]:
        """Image ids of a client, (images of the client,) int32.

        Raises: IndexError: there is no such client.
        """


@dataclass(frozen=True)
class Partition:
    """Images by client, in compressed rows.

    offsets: (N + 1,) int64, from 0 to the number of images, never falling.
    indices: (images,) int32 image ids; client i holds `indices[offsets[i]:offsets[i + 1]]`.
    """

    offsets: NDArray[np.int64]
    indices: NDArray[np.int32]

    @property
    def num_clients(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """(N,) int64, images of each client."""
        return np.diff(self.offsets)

    @property
    def num_holders(self) -> int:
        """Clients that have images."""
        return int(np.count_nonzero(self.sizes))

    @cached_property
    def owners(self) -> NDArray[np.int32]:
        """(images,) int32, the client of each entry of `indices`."""
        return np.repeat(np.arange(self.num_clients, dtype=np.int32), self.sizes)

    def client(self, client_id: int) -> NDArray[np.int32]:
        """Image ids of a client: a view, (images of the client,) int32.

        Raises: IndexError: there is no such client.
        """
        _check_id(client_id, self.num_clients)
        return self.indices[self.offsets[client_id] : self.offsets[client_id + 1]]


@dataclass(frozen=True)
class SharedImages:
    """Clients that draw their images from all, each from (seed, client), when they are asked for.

    Nothing is stored for a client, so there may be any number of them. No client holds an image
    twice; two clients may hold the same. Non-IID as in a partition: `classes_per_client` classes at
    random, in equal shares, or proportions of the classes from Dirichlet(alpha) (as far as a class
    has images). The fields are those of the config.

    Raises: InputError: no labels for a non-IID setting, or a client's classes are too small.
    """

    num_images: int
    labels: NDArray[np.integer] | None
    num_clients: int
    images_per_client: int
    classes_per_client: int | None
    alpha: float | None
    seed: int

    def __post_init__(self) -> None:
        per_class = self.classes_per_client
        if per_class is not None:
            _check_labels(self.labels, "config.classes_per_client", per_class)
            smallest = min(len(images) for images in self._by_class)
            if -(-self.images_per_client // per_class) > smallest:
                raise InputError(
                    "config.images_per_client",
                    self.images_per_client,
                    f"{per_class} classes a client, of which the smallest has {smallest} images",
                )
        if self.alpha is not None:
            _check_labels(self.labels, "config.dirichlet_alpha", self.alpha)

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        return np.broadcast_to(np.int64(self.images_per_client), (self.num_clients,))

    @property
    def num_holders(self) -> int:
        return self.num_clients

    def client(self, client_id: int) -> NDArray[np.int32]:
        _check_id(client_id, self.num_clients)
        rng = host_rng(self.seed, Stream.PARTITION, client_id)
        if self.classes_per_client is None and self.alpha is None:
            return rng.choice(self.num_images, self.images_per_client, replace=False).astype(
                np.int32
            )
        counts = self._class_counts(rng)
        held = [rng.choice(self._by_class[c], n, replace=False) for c, n in enumerate(counts) if n]
        return np.concatenate(held)

    def _class_counts(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """Images of each class that a client draws."""
        available = np.array([len(images) for images in self._by_class])
        if self.classes_per_client is not None:
            chosen = rng.choice(len(available), self.classes_per_client, replace=False)
            counts = np.zeros(len(available), np.int64)
            counts[chosen] = np.diff(_even_cuts(self.images_per_client, len(chosen)))
            return counts
        counts = rng.multinomial(
            self.images_per_client, rng.dirichlet(np.full(len(available), self.alpha))
        )
        counts = np.minimum(counts, available)
        while (missing := self.images_per_client - counts.sum()) > 0:  # a class ran out
            room = available - counts
            counts += rng.multivariate_hypergeometric(room, min(missing, room.sum()))
        return counts

    @cached_property
    def _by_class(self) -> list[NDArray[np.int32]]:
        """Image ids of each class."""
        labels = self.labels
        assert labels is not None, "checked when the object was made"
        order = np.argsort(labels, kind="stable").astype(np.int32)
        return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


class RichShare(NamedTuple):
    """clients: that are rich, those with the first ids. data: share of all images that they hold
    together, in (0, 1); each holds as many, and so do the others of what is left."""

    clients: int
    data: float


def iid(num_images: int, num_clients: int, seed: int, rich: RichShare | None = None) -> Partition:
    """Images at random, in parts whose sizes differ by one at most, among rich clients and others.

    Raises: InputError: more clients than images.
    """
    check_clients(num_clients, num_images)
    indices = host_rng(seed, Stream.PARTITION).permutation(num_images)
    return Partition(_cuts(num_images, num_clients, rich), indices.astype(np.int32))


def in_order(num_images: int, num_clients: int) -> Partition:
    """Images one after another, in parts whose sizes differ by one at most."""
    return Partition(_even_cuts(num_images, num_clients), np.arange(num_images, dtype=np.int32))


def by_classes(
    labels: NDArray[np.integer] | None,
    num_clients: int,
    classes_per_client: int,
    seed: int,
    rich: RichShare | None = None,
) -> Partition:
    """Shards of images sorted by label (McMahan et al. 2017; the paper's non-IID setting).

    Images, shuffled within their label, are cut into `num_clients * classes_per_client` shards
    whose sizes differ by one at most, and each client is dealt as many shards at random. A client
    may get two shards of one class, or a shard across the boundary of two. The shards of rich
    clients are larger, at random places among the others; one may be larger than a class.

    Args:
        labels: (images,) integers.
        num_clients: N.
        classes_per_client: shards of each client.
        seed: of the run.
        rich: None: all clients are alike.

    Raises:
        InputError: no labels, more clients or shards than images, fewer classes than asked for.
    """
    labels = _check_labels(labels, "config.classes_per_client", classes_per_client)
    num_images = len(labels)
    check_clients(num_clients, num_images)
    num_classes = len(np.unique(labels))
    if not 1 <= classes_per_client <= num_classes:
        raise InputError(
            "config.classes_per_client", classes_per_client, f"there are {num_classes} classes"
        )
    check_shards(num_clients, classes_per_client, num_images)
    num_shards = num_clients * classes_per_client
    rng = host_rng(seed, Stream.PARTITION)
    sorted_ids = _sort_by_label(labels, rng)
    dealt = rng.permutation(num_shards)  # shards of client 0, of client 1, ...
    cuts = _even_cuts(num_images, num_shards)
    if rich is not None:
        of_clients = RichShare(rich.clients * classes_per_client, rich.data)
        lengths = np.diff(_cuts(num_images, num_shards, of_clients))
        cuts = np.concatenate([[0], np.cumsum(lengths[np.argsort(dealt)])])
    lengths = np.diff(cuts)[dealt]
    ends = np.cumsum(lengths)
    positions = np.arange(num_images) + np.repeat(cuts[dealt] - (ends - lengths), lengths)
    offsets = np.concatenate([[0], ends[classes_per_client - 1 :: classes_per_client]])
    return Partition(offsets, sorted_ids[positions])


def dirichlet(
    labels: NDArray[np.integer] | None,
    num_clients: int,
    alpha: float,
    seed: int,
    rich: RichShare | None = None,
) -> Partition:
    """Each class spread over the clients in Dirichlet(alpha) proportions (Hsu et al. 2019).

    Small alpha: few clients hold a class. A client's share of a class is its proportion to within
    one image; clients may stay empty. Rich clients share their part of every class in such
    proportions, and the others theirs.

    Args:
        labels: (images,) integers.
        num_clients: N.
        alpha: concentration, > 0.
        seed: of the run.
        rich: None: all clients are alike.

    Raises:
        InputError: no labels, more clients than images, alpha not above 0.
    """
    labels = _check_labels(labels, "config.dirichlet_alpha", alpha)
    check_clients(num_clients, len(labels))
    if not 0 < alpha < np.inf:
        raise InputError("config.dirichlet_alpha", alpha, "a finite number above 0 is needed")
    rng = host_rng(seed, Stream.PARTITION)
    sorted_ids = _sort_by_label(labels, rng)
    owners = np.empty(len(labels), np.int32)
    start = 0
    for count in np.unique(labels, return_counts=True)[1]:
        share_ends = np.cumsum(_proportions(rng, num_clients, alpha, rich))
        # Image j of a class lies at (j + 1/2) / count of the way through the clients' shares.
        place = (np.arange(count) + 0.5) / count * share_ends[-1]
        owners[start : start + count] = np.searchsorted(share_ends, place)
        start += count
    sizes = np.bincount(owners, minlength=num_clients)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return Partition(offsets, sorted_ids[np.argsort(owners, kind="stable")])


def describe(
    partition: ClientImages, labels: NDArray[np.integer] | None, num_classes: int | None
) -> dict[str, int | float]:
    """Facts about who holds what.

    Returns: clients, empty_clients, images_min, images_median and images_max a client; of a
        partition with labels also classes_min, classes_mean and classes_max a client, over clients
        that have images.
    """
    sizes = partition.sizes
    facts: dict[str, int | float] = {
        "clients": partition.num_clients,
        "empty_clients": int(np.sum(sizes == 0)),
        "images_min": int(sizes.min()),
        "images_median": float(np.median(sizes)),
        "images_max": int(sizes.max()),
    }
    if isinstance(partition, Partition) and labels is not None and num_classes is not None:
        # Distinct (client, class) pairs: no (N, num_classes) array, which a million clients forbid.
        cells = partition.owners.astype(np.int64) * num_classes + labels[partition.indices]
        pairs = np.sort(cells)
        distinct = pairs[np.diff(pairs, prepend=-1) != 0]
        classes = np.bincount(distinct // num_classes)
        classes = classes[classes > 0]
        facts["classes_min"] = int(classes.min())
        facts["classes_mean"] = round(float(classes.mean()), 2)
        facts["classes_max"] = int(classes.max())
    return facts


def check_clients(num_clients: int, num_images: int) -> None:
    """Raises: InputError: more clients than images, where no image belongs to two clients."""
    if not 1 <= num_clients <= num_images:
        allowed = f"at most one client an image: 1 to {num_images}, or set config.images_per_client"
        raise InputError("config.num_clients", num_clients, allowed)


def check_rich_share(
    rich: RichShare, num_images: int, num_clients: int, per_client: int = 1
) -> None:
    """Raises: InputError: a client of either kind would hold fewer images than `per_client`."""
    held = round(rich.data * num_images)
    for kind, images, clients in (
        ("rich", held, rich.clients),
        ("other", num_images - held, num_clients - rich.clients),
    ):
        if images < clients * per_client:
            needed = f"the {clients} {kind} clients share {images} of {num_images} images"
            allowed = f"{needed}, and each needs at least {per_client}"
            raise InputError("config.rich.data", rich.data, allowed)


def check_shards(num_clients: int, classes_per_client: int, num_images: int) -> None:
    """Raises: InputError: more shards than images, where no image belongs to two clients."""
    if num_clients * classes_per_client > num_images:
        raise InputError(
            "config.classes_per_client",
            classes_per_client,
            f"{num_clients} clients * {classes_per_client} shards exceed {num_images} images",
        )


def _even_cuts(length: int, parts: int) -> NDArray[np.int64]:
    """Boundaries of `parts` consecutive parts whose sizes differ by one at most, (parts + 1,)."""
    return np.arange(parts + 1, dtype=np.int64) * length // parts


def _cuts(length: int, parts: int, rich: RichShare | None) -> NDArray[np.int64]:
    """The same, where the first parts are those of rich clients and the others are even too."""
    if rich is None:
        return _even_cuts(length, parts)
    held = round(rich.data * length)
    others = _even_cuts(length - held, parts - rich.clients)
    return np.concatenate([_even_cuts(held, rich.clients), held + others[1:]])


def _proportions(
    rng: np.random.Generator, num_clients: int, alpha: float, rich: RichShare | None
) -> NDArray[np.float64]:
    """Shares of a class, (N,), which add up to 1."""
    if rich is None:
        return rng.dirichlet(np.full(num_clients, alpha))
    first, others = (
        rng.dirichlet(np.full(n, alpha)) for n in (rich.clients, num_clients - rich.clients)
    )
    return np.concatenate([rich.data * first, (1 - rich.data) * others])


def _sort_by_label(labels: NDArray[np.integer], rng: np.random.Generator) -> NDArray[np.int32]:
    """Image ids by label, in random order within a label."""
    shuffled = rng.permutation(len(labels)).astype(np.int32)
    return shuffled[np.argsort(labels[shuffled], kind="stable")]


def _check_id(client_id: int, num_clients: int) -> None:
    if not 0 <= client_id < num_clients:
        raise IndexError(f"client {client_id} of {num_clients}")


def _check_labels(
    labels: NDArray[np.integer] | None, field: str, value: float
) -> NDArray[np.integer]:
    if labels is None:
        raise InputError(field, value, "images without labels can only be IID: leave it unset")
    return labels

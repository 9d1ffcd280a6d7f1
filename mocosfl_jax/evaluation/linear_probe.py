"""Probes: a small head trained on frozen, cached features, and its test accuracy.

`train_head` is the loop; a head is a frozen object with `init`, `step` and `logits`. Reference:
Li et al., "MocoSFL: enabling cross-client collaborative self-supervised learning", ICLR 2023
(linear evaluation: one layer, Adam 1e-3, batch 128, 100 epochs).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from mocosfl_jax.errors import InputError
from mocosfl_jax.evaluation.features import check_labelled
from mocosfl_jax.learning.adam import adam_update
from mocosfl_jax.randomness import Stream, device_key

PyTree = Any

_START = 2**32 - 1  # what a head starts from; the number of no epoch


class Labelled(NamedTuple):
    """Features and their classes."""

    features_MD: np.ndarray  # float
    labels_M: np.ndarray  # integers in [0, num_classes)


class Batch(NamedTuple):
    """What a head's step sees. Padding rows have mask 0 and must not count."""

    features_BD: jax.Array  # float32
    labels_B: jax.Array  # int32
    mask_B: jax.Array  # float32, 1 for a row of the data, 0 for padding; at least one 1


class Head(Protocol):
    """A classifier over features together with its update rule. Hashable, equal by value."""

    @property
    def num_classes(self) -> int:
        """Width of the logits."""

    def init(self, width: int, key: jax.Array) -> PyTree:
        """The state (parameters, optimizer, ...) before training, for features of `width`; what is
        random in it comes from the key."""

    def step(self, state: PyTree, batch: Batch) -> PyTree:
        """The state after one batch. Pure and traceable."""

    def logits(self, state: PyTree, features_MD: jax.Array) -> jax.Array:
        """Class scores float32 (M, num_classes) in evaluation. Pure and traceable."""


class ProbeResult(NamedTuple):
    """Test accuracy of a linear probe, and the probe."""

    top1_last: float  # percent, after the last epoch: the number to report
    top1_best_test_epoch: float  # percent, best over epochs, CHOSEN ON TEST LABELS: the paper's way
    best_epoch: int  # the first that reached it, counted from 1
    kernel: np.ndarray  # float32 (D, num_classes), after the last epoch
    bias: np.ndarray  # float32 (num_classes,), after the last epoch


class LinearState(NamedTuple):
    """State of a `LinearHead`."""

    params: dict[str, jax.Array]  # kernel (D, num_classes), bias (num_classes,); float32
    optimizer: optax.OptState  # Adam's moments and count


@dataclass(frozen=True)
class LinearHead:
    """One linear layer, cross-entropy, Adam (betas 0.9 and 0.999, eps 1e-8, no decay).

    Kernel and bias start at zero: the problem is convex, so the start needs no randomness, and
    the seed moves only the order of the examples.
    """

    num_classes: int
    learning_rate: float

    def init(self, width: int, key: jax.Array) -> LinearState:
        """Zero parameters for features (B, width)."""
        params = {
            "kernel": jnp.zeros((width, self.num_classes), jnp.float32),
            "bias": jnp.zeros((self.num_classes,), jnp.float32),
        }
        return LinearState(params, optax.adam(self.learning_rate).init(params))

    def step(self, state: LinearState, batch: Batch) -> LinearState:
        """One Adam step on the mean cross-entropy over the batch's unmasked rows."""

        def loss_fn(params: dict[str, jax.Array]) -> jax.Array:
            return cross_entropy(_affine(params, batch.features_BD), batch)

        grads = jax.grad(loss_fn)(state.params)
        adam = optax.adam(self.learning_rate)
        return LinearState(*adam_update(adam, state.params, state.optimizer, grads))

    def logits(self, state: LinearState, features_MD: jax.Array) -> jax.Array:
        """features @ kernel + bias."""
        return _affine(state.params, features_MD)


def linear_probe(
    train: Labelled,
    test: Labelled,
    num_classes: int,
    *,
    seed: int,
    learning_rate: float = 1e-3,
    batch_size: int = 128,
    epochs: int = 100,
    before_epoch: Callable[[], None] | None = None,
) -> ProbeResult:
    """Trains a `LinearHead` on frozen features, used as they are, and tests it after every epoch.

    Args:
      train: features (M, D) and labels to train on.
      test: the same for the test, with the same D.
      num_classes: classes of both sets.
      seed: of the order of the examples.
      learning_rate: Adam's, constant, > 0.
      batch_size: >= 1; the last batch of an epoch may have fewer rows.
      epochs: >= 1.
      before_epoch: called before each epoch; may raise to end the work.

    Raises:
      InputError: what `train_head` refuses, or a learning rate that is not positive.
    """
    check_learning_rate(learning_rate)
    head = LinearHead(num_classes, learning_rate)
    state, top1_E = train_head(
        head,
        train,
        test,
        seed=seed,
        batch_size=batch_size,
        epochs=epochs,
        before_epoch=before_epoch,
    )
    best = int(np.argmax(top1_E))
    return ProbeResult(
        top1_last=float(top1_E[-1]),
        top1_best_test_epoch=float(top1_E[best]),
        best_epoch=best + 1,
        **jax.device_get(state.params),
    )


def train_head(
    head: Head,
    train: Labelled,
    test: Labelled,
    *,
    seed: int,
    batch_size: int,
    epochs: int,
    before_epoch: Callable[[], None] | None = None,
) -> tuple[PyTree, np.ndarray]:
    """Trains any head: each epoch a fresh permutation of `train`, then the accuracy on `test`.

    Epoch e (from 0) draws its permutation from fold_in(device_key(seed, Stream.PROBE), e), and the
    head starts from fold_in of the same key and 2**32 - 1, which no epoch has. An epoch is one
    dispatch, a scan over its batches; the last is padded and masked, nothing is dropped.

    Args:
      head: what is trained; a static argument of the compiled epoch.
      train: features (M, D) and labels to train on; copied to the device once.
      test: the same for the test, with the same D.
      seed: of the permutations, and of what is random in the head's start.
      batch_size: >= 1.
      epochs: >= 1.
      before_epoch: called before each epoch, of which two at most are on the device; may raise to
        end the work.

    Returns:
      The last state and the top-1 test accuracy after each epoch in percent, float64 (epochs,).

    Raises:
      InputError: what `check_labelled` refuses in either set, sets of two widths, or a batch size
        or number of epochs below 1.
    """
    _check(head, train, test, batch_size, epochs)
    train_features_MD, train_labels_M = _on_device(train)
    test_features_MD, test_labels_M = _on_device(test)
    key = device_key(seed, Stream.PROBE)
    state = head.init(train_features_MD.shape[1], jax.random.fold_in(key, _START))
    correct_E: list[jax.Array] = []
    for epoch in range(epochs):
        if before_epoch is not None:
            jax.block_until_ready(correct_E[-2:-1])
            before_epoch()
        state = _run_epoch(head, batch_size, state, train_features_MD, train_labels_M, key, epoch)
        correct_E.append(_count_correct(head, state, test_features_MD, test_labels_M))
    return state, 100.0 * np.array(jax.device_get(correct_E), np.float64) / len(test.labels_M)


def cross_entropy(logits_BC: jax.Array, batch: Batch) -> jax.Array:
    """Mean over the batch's rows that count, ()."""
    loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, batch.labels_B)
    return jnp.sum(loss_B * batch.mask_B) / jnp.sum(batch.mask_B)


def check_learning_rate(learning_rate: float) -> None:
    """Raises: InputError: it is not positive."""
    if learning_rate <= 0:
        raise InputError("learning_rate", learning_rate, "> 0")


@partial(jax.jit, static_argnames=("head", "batch_size"))
def _run_epoch(
    head: Head,
    batch_size: int,
    state: PyTree,
    features_MD: jax.Array,
    labels_M: jax.Array,
    key: jax.Array,
    epoch: int,
) -> PyTree:
    size = labels_M.shape[0]
    steps = -(-size // batch_size)
    order_M = jax.random.permutation(jax.random.fold_in(key, epoch), size)
    rows_SB = jnp.pad(order_M, (0, steps * batch_size - size)).reshape(steps, batch_size)
    mask_SB = (jnp.arange(steps * batch_size) < size).astype(jnp.float32).reshape(rows_SB.shape)

    def step(state: PyTree, rows_and_mask: tuple[jax.Array, jax.Array]) -> tuple[PyTree, None]:
        rows_B, mask_B = rows_and_mask
        return head.step(state, Batch(features_MD[rows_B], labels_M[rows_B], mask_B)), None

    return lax.scan(step, state, (rows_SB, mask_SB))[0]


@partial(jax.jit, static_argnames="head")
def _count_correct(
    head: Head, state: PyTree, features_MD: jax.Array, labels_M: jax.Array
) -> jax.Array:
    return jnp.sum(jnp.argmax(head.logits(state, features_MD), axis=1) == labels_M)


def _affine(params: dict[str, jax.Array], features_MD: jax.Array) -> jax.Array:
    product_MC = jnp.matmul(features_MD, params["kernel"], precision=lax.Precision.HIGHEST)
    return product_MC + params["bias"][None]


def _on_device(data: Labelled) -> tuple[jax.Array, jax.Array]:
    features_MD = jax.device_put(np.asarray(data.features_MD, np.float32))
    return features_MD, jax.device_put(np.asarray(data.labels_M, np.int32))


def _check(head: Head, train: Labelled, test: Labelled, batch_size: int, epochs: int) -> None:
    check_labelled("train", train.features_MD, train.labels_M, head.num_classes)
    check_labelled("test", test.features_MD, test.labels_M, head.num_classes)
    if train.features_MD.shape[1] != test.features_MD.shape[1]:
        allowed = f"train's {train.features_MD.shape[1]}"
        raise InputError("test_features width", test.features_MD.shape[1], allowed)
    if batch_size < 1:
        raise InputError("batch_size", batch_size, ">= 1")
    if epochs < 1:
        raise InputError("epochs", epochs, ">= 1")

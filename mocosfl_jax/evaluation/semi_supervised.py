"""Semi-supervised probe: a small network on frozen features, trained with few of the labels.

Protocol of FedU (Zhuang et al., "Collaborative unsupervised visual representation learning from
decentralized data", ICCV 2021), as in the public code of MocoSFL: 10 % or 1 % of the labels; 512
hidden units with BatchNorm and ReLU; Adam 1e-3, a tenth of it after 60 and after 80 % of the
training; batch 128, 100 epochs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from mocosfl_jax.data.dataset import drawn_by_class
from mocosfl_jax.evaluation.features import check_labelled
from mocosfl_jax.evaluation.linear_probe import (
    Batch,
    Labelled,
    check_learning_rate,
    cross_entropy,
    train_head,
)
from mocosfl_jax.learning.adam import adam_update
from mocosfl_jax.learning.schedule import rate_schedule
from mocosfl_jax.models.norms import MaskedBatchNorm
from mocosfl_jax.randomness import Stream, host_rng

FRACTIONS = {"semi_10_top1": 0.1, "semi_1_top1": 0.01}
"""Shares of the labels, by the name of the accuracy that is reached with them."""

HIDDEN = 512
"""Units of the hidden layer."""


class MLP(nn.Module):
    """Dense, BatchNorm, ReLU, dense; kernels start Xavier uniform, biases at 0.

    Attributes: hidden: units of the hidden layer; num_classes: of the output.
    """

    hidden: int
    num_classes: int

    @nn.compact
    def __call__(self, features_MD: jax.Array, mask_M: jax.Array, train: bool) -> jax.Array:
        """Class scores, float32 (M, num_classes). Args: as of `MaskedBatchNorm`."""
        init, precision = nn.initializers.xavier_uniform(), jax.lax.Precision.HIGHEST
        dense = partial(nn.Dense, kernel_init=init, precision=precision)
        # BatchNorm subtracts the first layer's bias again. Its gradient would be nothing but
        # rounding, of which Adam makes steps as large as any.
        x = dense(self.hidden, use_bias=False, name="dense1")(features_MD)
        x = nn.relu(MaskedBatchNorm(name="norm")(x, mask_M, train))
        return cast(jax.Array, dense(self.num_classes, name="dense2")(x))


class MLPState(NamedTuple):
    """State of an `MLPHead`.

    params: `dense1`, `norm`, `dense2`. stats: running mean and variance of the norm. optimizer:
    Adam's moments and count. All float32, but for the count.
    """

    params: Any
    stats: Any
    optimizer: optax.OptState


@dataclass(frozen=True)
class MLPHead:
    """An `MLP`, cross-entropy, Adam (betas 0.9 and 0.999, eps 1e-8, no decay).

    learning_rate: at the start. steps: of the whole training, which the rate follows.
    """

    num_classes: int
    learning_rate: float
    steps: int
    hidden: int = HIDDEN

    def init(self, width: int, key: jax.Array) -> MLPState:
        """Random parameters for features (B, width)."""

        def init(key: jax.Array) -> Any:
            rows = jnp.zeros((1, width), jnp.float32)
            return self._network.init(key, rows, jnp.ones(1, bool), False)

        variables = jax.jit(init)(key)
        params, stats = variables["params"], variables["batch_stats"]
        return MLPState(params, stats, self._adam.init(params))

    def step(self, state: MLPState, batch: Batch) -> MLPState:
        """One Adam step on the mean cross-entropy over the batch's unmasked rows, which BatchNorm
        sees alone. A single row has no variance: such a batch changes nothing."""
        mask_B = batch.mask_B > 0

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state.stats}
            logits_BC, updated = self._network.apply(
                variables, batch.features_BD, mask_B, True, mutable=["batch_stats"]
            )
            return cross_entropy(logits_BC, batch), updated["batch_stats"]

        grads, stats = jax.grad(loss_fn, has_aux=True)(state.params)
        params, optimizer = adam_update(self._adam, state.params, state.optimizer, grads)
        several = jnp.sum(mask_B) > 1
        after = MLPState(params, stats, optimizer)
        return jax.tree.map(lambda new, old: jnp.where(several, new, old), after, state)

    def logits(self, state: MLPState, features_MD: jax.Array) -> jax.Array:
        """Class scores, BatchNorm with its running statistics."""
        variables = {"params": state.params, "batch_stats": state.stats}
        rows = jnp.ones(features_MD.shape[0], bool)
        return cast(jax.Array, self._network.apply(variables, features_MD, rows, False))

    @property
    def _network(self) -> MLP:
        return MLP(self.hidden, self.num_classes)

    @property
    def _adam(self) -> optax.GradientTransformation:
        factor = rate_schedule("step", self.steps)
        return optax.adam(lambda step: self.learning_rate * factor(step))


def labelled_subset(labels_M: NDArray[np.integer], fraction: float, seed: int) -> NDArray[np.int64]:
    """Rows whose labels are given: this share of each class, rounded, at least one, at random.

    Args:
      labels_M: class of each row.
      fraction: in (0, 1]; the rows of a smaller one are among those of a larger one.
      seed: of the run.

    Returns: the rows, ascending.
    """
    _, counts = np.unique(labels_M, return_counts=True)
    numbers = np.maximum(np.rint(counts * fraction).astype(np.int64), 1)
    return np.flatnonzero(drawn_by_class(labels_M, numbers, host_rng(seed, Stream.PROBE)))


def semi_supervised_probe(
    train: Labelled,
    test: Labelled,
    num_classes: int,
    fraction: float,
    *,
    seed: int,
    learning_rate: float = 1e-3,
    batch_size: int = 128,
    epochs: int = 100,
    before_epoch: Callable[[], None] | None = None,
) -> float:
    """Trains an `MLPHead` on a share of the training features, and tests the last epoch.

    Args:
      train: features (M, D) and labels, of which `labelled_subset` is used.
      test: the same for the test, with the same D.
      num_classes: classes of both sets.
      fraction: of the labels, in (0, 1].
      seed: of the labels, the first parameters and the order of the examples.
      learning_rate: Adam's at the start, > 0.
      batch_size: >= 1; the last batch of an epoch may have fewer rows.
      epochs: >= 1.
      before_epoch: called before each epoch; may raise to end the work.

    Returns: top-1 accuracy on `test` in percent.

    Raises:
      InputError: what `train_head` refuses, or a learning rate that is not positive.
    """
    check_learning_rate(learning_rate)
    check_labelled("train", train.features_MD, train.labels_M, num_classes)
    rows = labelled_subset(train.labels_M, fraction, seed)
    steps = epochs * -(-len(rows) // max(1, batch_size))
    _, top1_E = train_head(
        MLPHead(num_classes, learning_rate, steps),
        Labelled(train.features_MD[rows], train.labels_M[rows]),
        test,
        seed=seed,
        batch_size=batch_size,
        epochs=epochs,
        before_epoch=before_epoch,
    )
    return float(top1_E[-1])

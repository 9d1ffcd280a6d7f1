"""Local training on a network of one convolution, for tests of its parts."""

import functools
from typing import Any

import jax
import numpy as np

from mocosfl_jax.federated.axes import NO_MESH, Axes
from mocosfl_jax.learning.sgd import sgd
from mocosfl_jax.methods.local.learner import Learner
from mocosfl_jax.methods.local.merge import Average
from mocosfl_jax.methods.local.method import LocalTraining
from mocosfl_jax.methods.local.objectives import OBJECTIVES
from mocosfl_jax.models.contract import Network
from mocosfl_jax.models.split import SplitModel, build_model

SIZE, WIDTH, QUEUE = 4, 6, 10
MOMENTUM, DECAY, TEMPERATURE, EMA, RATE = 0.9, 5e-3, 0.2, 0.7, 0.05


@functools.cache
def stem_and_head(head: str = "largeV2") -> SplitModel:
    """The hidden layer of the head largeV2 has 12 columns and BatchNorm."""
    return build_model(
        Network("resnet18", 4, (), "3x3s1"),
        cut=1,
        bottleneck=None,
        head=head,
        head_width=WIDTH,
        image_size=SIZE,
    )


def local(
    objective: str, merge: Average, rate: float = RATE, axes: Axes = NO_MESH, chunks: int = 1
) -> LocalTraining:
    learner = Learner(
        stem_and_head(), OBJECTIVES[objective], sgd(MOMENTUM, DECAY), TEMPERATURE, EMA
    )
    return LocalTraining(learner, merge, rate, QUEUE, chunks=chunks, axes=axes)


def moved(tree: Any, seed: int, scale: float = 0.1) -> Any:
    """With noise on every float."""
    rng = np.random.default_rng(seed)

    def leaf(x: Any) -> Any:
        noise = (scale * rng.normal(size=x.shape)).astype(np.float32)
        return x + noise if np.issubdtype(x.dtype, np.floating) else x

    return jax.tree.map(leaf, tree)

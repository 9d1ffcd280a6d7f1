"""Projection heads: pooled features (R, F) to embeddings (R, D), before normalisation.

V1: one dense layer (He et al. 2020, arXiv 1911.05722). V2: two with ReLU between (Chen et al. 2020,
arXiv 2003.04297); smallV2 is V2 at half the width. largeV2: a hidden layer twice as wide as the
output, with BatchNorm (the MocoSFL paper's code).
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mocosfl_jax.models.norms import MaskedBatchNorm


class HeadShape(NamedTuple):
    """The rule behind a head's name.

    width: default D, width of the embedding.
    hidden: hidden width over D: 0 for none, else that many times D (times the block expansion where
      `expands`).
    expands: whether the hidden layer grows with the block expansion of the backbone.
    batch_norm: BatchNorm after the hidden layer.
    """

    width: int
    hidden: int
    expands: bool
    batch_norm: bool


HEADS = {
    "V1": HeadShape(width=128, hidden=0, expands=False, batch_norm=False),
    "smallV2": HeadShape(width=512, hidden=1, expands=True, batch_norm=False),
    "V2": HeadShape(width=1024, hidden=1, expands=True, batch_norm=False),
    "largeV2": HeadShape(width=2048, hidden=2, expands=False, batch_norm=True),
}


class Head(nn.Module):
    """Projection head.

    Attributes: width: D; hidden: width of the hidden layer, 0 for none; batch_norm: whether it is
    normalised over the rows; dtype: of the computation; row_axes: mesh axes over which the rows
    of a batch are spread, none without a mesh.
    """

    width: int
    hidden: int
    batch_norm: bool
    dtype: DTypeLike
    row_axes: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, features_RF: jax.Array, mask_R: jax.Array, train: bool) -> jax.Array:
        """Embeddings (R, D), float32; masked rows do not enter the batch statistics."""

        def dense(width: int, name: str) -> nn.Dense:
            init = nn.initializers.xavier_uniform()
            return nn.Dense(width, kernel_init=init, dtype=self.dtype, name=name)

        x = features_RF.astype(self.dtype)
        if not self.hidden:
            return dense(self.width, "dense1")(x).astype(jnp.float32)
        x = dense(self.hidden, "dense1")(x)
        if self.batch_norm:
            norm = MaskedBatchNorm(self.row_axes, name="norm")
            x = norm(x.astype(jnp.float32), mask_R, train).astype(self.dtype)
        return dense(self.width, "dense2")(nn.relu(x)).astype(jnp.float32)

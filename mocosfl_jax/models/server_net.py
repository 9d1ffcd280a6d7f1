"""The server's network: the server half of the bottleneck, the units after the cut, pooling."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mocosfl_jax.models.bottleneck import BottleneckDecoder, BottleneckShape
from mocosfl_jax.models.contract import Unit


class ServerNet(nn.Module):
    """Server half of the bottleneck, units from the cut on, global average pooling.

    Attributes: units: those after the cut; cut: index of the first of them; bottleneck: its shape,
    or None; latent_channels: channels at the cut before the bottleneck; dtype: of the computation.
    """

    units: tuple[Unit, ...]
    cut: int
    bottleneck: BottleneckShape | None
    latent_channels: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, latents_RHWC: jax.Array) -> jax.Array:
        """Pooled features (R, F), float32."""
        x = latents_RHWC
        if self.bottleneck is not None:
            decoder = BottleneckDecoder(
                self.bottleneck, self.latent_channels, self.dtype, name="bottleneck"
            )
            x = decoder(x)
        for index, unit in enumerate(self.units):
            x = unit.clone(parent=self, name=f"unit{self.cut + index}")(x)
        return x.astype(jnp.float32).mean(axis=(1, 2))

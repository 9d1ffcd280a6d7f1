"""BatchNorm over the rows of a batch that count."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class MaskedBatchNorm(nn.Module):
    """BatchNorm (Ioffe & Szegedy 2015) whose statistics are those of the rows that count.

    Epsilon is 1e-5. Running statistics move by 0.1 towards the mean and the unbiased variance of
    the batch, as in PyTorch.

    Attributes: row_axes: mesh axes over which the rows of a batch are spread, none without a mesh;
    devices may hold different numbers of rows that count.
    """

    row_axes: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x_RF: jax.Array, mask_R: jax.Array, train: bool) -> jax.Array:
        """Normalised rows (R, F), or images (R, H, W, F), float32 like the input.

        Args: mask_R: bool; train: normalise with the statistics of this batch, of rows and pixels,
        and move the running ones; where no row counts these are 0.
        """
        shape = x_RF.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        mean_F, var_F = running_mean.value, running_var.value
        if train:
            count, mean_F, var_F = self._moments(x_RF, mask_R)
            unbiased_F = var_F * (count / jnp.maximum(count - 1, 1))
            running_mean.value = 0.9 * running_mean.value + 0.1 * mean_F
            running_var.value = 0.9 * running_var.value + 0.1 * unbiased_F
        factor_F = scale * jax.lax.rsqrt(var_F + 1e-5)
        return (x_RF - _like(x_RF, mean_F)) * _like(x_RF, factor_F) + _like(x_RF, bias)

    def _moments(
        self, x_RF: jax.Array, mask_R: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Number () of values of a feature that count on all devices, their mean (F,) and biased
        variance (F,)."""

        def total(x_RF: jax.Array) -> jax.Array:
            rows_RF = jnp.sum(x_RF, axis=tuple(range(1, x_RF.ndim - 1)))  # without a masked copy
            summed = jnp.sum(rows_RF, axis=0, where=mask_R[:, None])
            return jax.lax.psum(summed, self.row_axes) if self.row_axes else summed

        count = jnp.maximum(total(jnp.ones_like(x_RF[..., :1]))[0], 1)
        mean_F = total(x_RF) / count
        return count, mean_F, total(jnp.square(x_RF - _like(x_RF, mean_F))) / count


def _like(x_RF: jax.Array, values_F: jax.Array) -> jax.Array:
    """One value a feature, with the number of axes of x."""
    return values_F.reshape(*[1] * (x_RF.ndim - 1), -1)

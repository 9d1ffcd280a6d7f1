import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mocosfl_jax.models.decoder import Decoder, doublings, parse_decoder, zero_bias
from mocosfl_jax.models.norms import MaskedBatchNorm

SIZE = 8


@pytest.mark.parametrize(
    ("text", "shape"),
    [("res_normN4C64", ("res_norm", 4, 64)), ("conv_normN0C3", ("conv_norm", 0, 3))],
)
def test_a_name_is_read(text, shape):
    assert parse_decoder(text) == shape


@pytest.mark.parametrize(
    "text", ["", "res_norm", "res_normN4", "res_normN4C0", "res_normN04C4", "norm_resN4C4",
             "res_normN4C64 ", "res_normN-1C4", "res_normN4C10000", "RES_NORMN4C64"]
)  # fmt: skip
def test_a_name_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="0 to 9999 blocks and 1 to 9999 channels"):
        parse_decoder(text)


def test_doublings():
    assert [doublings(size, 32) for size in (32, 16, 8, 1)] == [0, 1, 2, 5]
    assert doublings(7, 28) == 2
    for latent, image in ((5, 9), (12, 32), (10, 30), (64, 32)):
        with pytest.raises(ValueError, match=f"{latent} pixels .* images of {image}"):
            doublings(latent, image)


def variables_of(decoder: Decoder, *latent: int) -> dict:
    """Random ones, running statistics and norms among them."""
    latents, rows = jnp.zeros((1, *latent)), jnp.ones(1, bool)
    init = functools.partial(decoder.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), latents, rows)
    rng = np.random.default_rng(3)

    def leaf(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.normal(size=x.shape) * 0.2
        return jnp.asarray(values**2 + 0.5 if path[-1].key in ("var", "scale") else values, x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


# --------------------------------------------------------------------- an oracle, layer by layer


class Plain:
    """The layers' mathematics on named parameters; convolutions are JAX's own."""

    def __init__(self, variables: dict, norm: str):
        self.params, self.stats = variables["params"], variables.get("batch_stats")
        self.grouped = norm == "group"

    def conv(self, x, layer, name, doubles=False):
        kernel = np.asarray(self.params[layer][name]["kernel"], np.float64)
        if self.grouped and not doubles:
            centred = kernel - kernel.mean((0, 1, 2))
            kernel = centred / (kernel.std((0, 1, 2), ddof=1) + 1e-5)
        bias = np.asarray(self.params[layer][name].get("bias", 0.0))
        return (transposed if doubles else convolved)(x, kernel) + bias

    def norm(self, x, layer, name):
        scale, bias = (np.asarray(self.params[layer][name][k]) for k in ("scale", "bias"))
        if not self.grouped:
            mean, var = (np.asarray(self.stats[layer][name][k]) for k in ("mean", "var"))
            return (x - mean) / np.sqrt(var + 1e-5) * scale + bias
        groups = {8: 2, 4: 1, 3: 1, 5: 1}[x.shape[-1]]
        split = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
        mean, var = (f(split, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
        return ((split - mean) / np.sqrt(var + 1e-5)).reshape(x.shape) * scale + bias

    def block(self, x, layer):
        y = self.conv(relu(self.norm(x, layer, "norm0")), layer, "conv1")
        y = self.conv(relu(self.norm(y, layer, "norm1")), layer, "conv2")
        if x.shape[-1] != y.shape[-1]:
            x = self.norm(self.conv(x, layer, "shortcut_conv"), layer, "shortcut_norm")
        return x + y

    def plain(self, x, layer, doubles=False):
        return self.norm(self.conv(x, layer, "conv", doubles), layer, "norm")


def relu(x):
    return np.maximum(x, 0)


def convolved(x, kernel):
    x, kernel = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    numbers = ("NHWC", "HWIO", "NHWC")
    return np.asarray(
        lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
    )


def transposed(x, kernel):
    """out[2y+i-1, 2x+j-1] += x[y, x] kernel[i, j], one pixel after another."""
    batch, height, width, _ = x.shape
    out = np.zeros((batch, 2 * height + 2, 2 * width + 2, kernel.shape[-1]))
    for y, z in np.ndindex(height, width):
        for i, j in np.ndindex(3, 3):
            out[:, 2 * y + i, 2 * z + j] += x[:, y, z] @ kernel[i, j]
    return out[:, 1:-1, 1:-1]


CASES = {  # name, latent's side and channels: "b" for a block, "p" plain, "d" doubles
    ("res_normN0C8", 8, 5): "bbb" + "b",
    ("res_normN0C8", 4, 8): "bdb" + "b",
    ("conv_normN1C8", 8, 5): "pppp" + "p",
    ("conv_normN0C8", 1, 4): "pddd" + "p",
}


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_a_decoder_is_its_layers(case, norm):
    name, side, channels = case
    decoder = Decoder(parse_decoder(name), SIZE, norm=norm)
    variables = variables_of(decoder, side, side, channels)
    assert ("batch_stats" in variables) == (norm == "batch")
    latents = np.random.default_rng(4).normal(size=(3, side, side, channels)).astype(np.float32)
    plain = Plain(variables, norm)
    steps = {"b": plain.block, "p": plain.plain, "d": functools.partial(plain.plain, doubles=True)}
    x, last = latents, len(CASES[case]) - 1
    for index, kind in enumerate(CASES[case]):
        x = steps[kind](x, f"layer{index}")
        x = 1 / (1 + np.exp(-x)) if index == last else relu(x)
    apply = jax.jit(functools.partial(decoder.apply, train=False))
    found = apply(variables, latents, jnp.ones(3, bool))
    assert found.shape == (3, SIZE, SIZE, 3) and len(variables["params"]) == last + 1
    np.testing.assert_allclose(found, x, atol=2e-5)


def test_rows_that_do_not_count_change_nothing():
    """In training the statistics are those of the other rows, of which two remain."""
    decoder = Decoder(parse_decoder("res_normN0C4"), SIZE)
    variables = variables_of(decoder, 4, 4, 3)
    latents = jnp.asarray(np.random.default_rng(5).normal(size=(4, 4, 4, 3)), jnp.float32)
    mask = jnp.asarray([True, False, True, False])
    apply = functools.partial(decoder.apply, variables, train=True, mutable=["batch_stats"])
    train = jax.jit(apply)
    few, few_stats = train(latents[mask], jnp.ones(2, bool))
    found, stats = train(latents, mask)
    np.testing.assert_allclose(found[mask], few, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), stats, few_stats)
    assert not np.allclose(few, train(latents, jnp.ones(4, bool))[0][mask], atol=1e-3)


def test_batch_norm_of_images():
    rng = np.random.default_rng(6)
    x, mask = rng.normal(2, 3, size=(4, 2, 5, 3)).astype(np.float32), np.arange(4) != 1
    stats = {"mean": jnp.asarray([1.0, 2, 3]), "var": jnp.asarray([4.0, 5, 6])}
    params = {"scale": np.float32([0.5, 1, 2]), "bias": np.float32([0, -1, 1])}
    found, updated = MaskedBatchNorm().apply(
        {"params": params, "batch_stats": stats}, x, mask, True, mutable=["batch_stats"]
    )
    counted = x[mask].reshape(-1, 3).astype(np.float64)
    mean, var, unbiased = counted.mean(0), counted.var(0), counted.var(0, ddof=1)
    want = (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(found, want, atol=1e-5)
    new = updated["batch_stats"]
    np.testing.assert_allclose(new["mean"], 0.9 * stats["mean"] + 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(new["var"], 0.9 * stats["var"] + 0.1 * unbiased, rtol=1e-5)


def test_what_masked_images_hold_does_not_matter():
    """Neither in what is computed of the other rows nor in the gradients; statistics also hold
    where it is NaN."""
    rng = np.random.default_rng(8)
    x, mask = jnp.asarray(rng.normal(size=(4, 2, 5, 3)), jnp.float32), np.arange(4) != 2
    module = MaskedBatchNorm()
    variables = module.init(jax.random.key(0), x, mask, False)
    weights = jnp.asarray(rng.normal(size=x[mask].shape), jnp.float32)

    def loss(params, x, mask):
        found, updated = module.apply(
            variables | {"params": params}, x, mask, True, mutable=["batch_stats"]
        )
        return (found[np.flatnonzero(mask)] * weights).sum(), updated

    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (want, want_stats), (want_params, want_x) = gradient(variables["params"], x[mask], mask[mask])
    other, with_nan = x.at[2].set(1e4), x.at[2].set(jnp.nan)
    (found, stats), (params, grads) = gradient(variables["params"], other, mask)
    chex.assert_trees_all_close(
        (found, stats, params, grads[mask]), (want, want_stats, want_params, want_x), atol=1e-5
    )
    nan_found, nan_stats = loss(variables["params"], with_nan, mask)
    chex.assert_trees_all_close((nan_found, nan_stats), (want, want_stats), atol=1e-5)


def test_a_batch_without_rows_is_finite():
    variables = MaskedBatchNorm().init(jax.random.key(0), jnp.zeros((2, 3)), None, False)
    found, updated = MaskedBatchNorm().apply(
        variables, jnp.ones((2, 3)), jnp.zeros(2, bool), True, mutable=["batch_stats"]
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((found, updated)))


@pytest.mark.parametrize("simulated", [False, True])
def test_initial_kernels_and_biases(simulated):
    xavier = {"kernel_init": nn.initializers.xavier_uniform(), "bias_init": zero_bias}
    decoder = Decoder(parse_decoder("res_normN0C16"), SIZE, **xavier if simulated else {})
    latents, rows = jnp.zeros((1, 4, 4, 5)), jnp.ones(1, bool)
    layers = jax.jit(decoder.init, static_argnums=3)(jax.random.key(7), latents, rows, False)
    for conv, inputs in ((("layer0", "conv1"), 5), (("layer1", "conv"), 16)):
        kernel, bias = (layers["params"][conv[0]][conv[1]][k] for k in ("kernel", "bias"))
        bound = (6 / (9 * (inputs + 16))) ** 0.5 if simulated else (9 * inputs) ** -0.5
        assert 0.97 * bound < np.abs(kernel).max() <= bound
        assert np.std(kernel) == pytest.approx(bound / 3**0.5, rel=0.05)
        assert np.abs(bias).max() <= (0 if simulated else bound)
        assert simulated or np.abs(bias).max() > bound / 2

"""The cut network: counts, shapes, values, heads; against NumPy and against itself uncut."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.methods.mocosfl.server import embed_views
from mocosfl_jax.models.bottleneck import parse_bottleneck
from mocosfl_jax.models.contract import Network
from mocosfl_jax.models.heads import HEADS, Head
from mocosfl_jax.models.split import SplitModel, Variables, build_model
from mocosfl_jax.models.units import StandardizedConv, standardize

SIZE = 8
UNITS = 3  # of the tiny network


def tiny(**changes) -> SplitModel:
    network = {
        "backbone": "resnet18",
        "width": 8,
        "blocks_per_stage": (1, 1),
        "stem": "3x3s1",
        "compute_dtype": "float32",
    }
    others = {"cut": 1, "bottleneck": None, "head": "V2", "head_width": 16, "image_size": SIZE}
    for name, value in changes.items():
        (network if name in network else others)[name] = value
    return build_model(Network(**network), **others)


def paper(backbone: str = "resnet18", **changes) -> SplitModel:
    """A network of the paper's depth and width, with the golden files' head."""
    settings = {"blocks_per_stage": None, "width": 64, "head_width": 128, "image_size": 32}
    return tiny(backbone=backbone, **settings | changes)


@functools.cache
def initialized(model: SplitModel) -> Variables:
    return jax.jit(model.init)(jax.random.key(5))


def count(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def images(batch: int = 3, size: int = SIZE) -> jax.Array:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(batch, size, size, 3)), jnp.float32)


def latent_shape(model: SplitModel) -> tuple[int, ...]:
    one = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    return jax.eval_shape(model.latents, model.shapes().client, one).shape[1:]


def feature_shape(model: SplitModel) -> tuple[int, ...]:
    one = jax.ShapeDtypeStruct((1, *latent_shape(model)), jnp.float32)
    return jax.eval_shape(model.features, model.shapes().server, one).shape[1:]


def test_shapes_are_those_of_init_and_the_callers_own():
    model = tiny(bottleneck=parse_bottleneck("C4S2"))
    expected = jax.eval_shape(model.init, jax.random.key(0))
    assert model.shapes() == expected
    model.shapes().client.clear()
    assert model.shapes() == expected


# --------------------------------------------------------------------------------------- backbones


@pytest.mark.parametrize(
    "cut, bottleneck, client, server",
    [
        (1, "none", 1_856, 11_249_152),
        (2, "none", 75_840, 11_175_168),
        (1, "C4S2", 4_164, 11_251_520),
    ],
)
def test_parameter_counts_are_the_papers(cut, bottleneck, client, server):
    variables = paper(cut=cut, bottleneck=parse_bottleneck(bottleneck)).shapes()
    assert (count(variables.client), count(variables.server)) == (client, server)


@pytest.mark.parametrize(
    "backbone, torchvision",  # without the classifier
    [
        ("resnet18", 11_176_512),
        ("resnet34", 21_284_672),
        ("resnet50", 23_508_032),
        ("resnet101", 42_500_160),
    ],
)
def test_backbones_have_torchvisions_parameters_but_for_the_stem(backbone, torchvision):
    variables = paper(backbone).shapes()
    units = count(variables.client) + count(variables.server) - count(variables.server["head"])
    assert units == torchvision - (7 * 7 - 3 * 3) * 3 * 64


@pytest.mark.parametrize(
    "stem, size, side", [("3x3s1", 32, 32), ("3x3s2", 64, 32), ("7x7s2", 224, 112)]
)
def test_stems_halve_what_they_should(stem, size, side):
    model = tiny(stem=stem, image_size=size, width=12)
    assert latent_shape(model) == (side, side, 12)
    k = int(stem[0])
    assert model.shapes().client["unit0"]["conv"]["kernel"].shape == (k, k, 3, 12)


@pytest.mark.parametrize(
    "backbone, cut, expected",
    [
        ("resnet18", 1, (8, 8, 8)),
        ("resnet18", 2, (8, 8, 8)),
        ("resnet18", 3, (4, 4, 16)),
        ("resnet50", 1, (8, 8, 8)),
        ("resnet50", 2, (8, 8, 32)),
        ("resnet50", 3, (4, 4, 64)),
    ],
)
@pytest.mark.parametrize(
    "bottleneck, stride", [("none", 1), ("C4S1", 1), ("C4S2", 2), ("C12S4", 4)]
)
def test_latents_at_every_cut(backbone, cut, expected, bottleneck, stride):
    model = tiny(backbone=backbone, cut=cut, bottleneck=parse_bottleneck(bottleneck))
    height, width, channels = expected
    if bottleneck != "none":
        channels = int(bottleneck[1:-2])
        decoder = model.shapes().server["bottleneck"]
        assert decoder[f"conv{len(decoder)}"]["bias"].shape == expected[-1:]
    assert latent_shape(model) == (height // stride, width // stride, channels)
    assert feature_shape(model) == (16 if backbone == "resnet18" else 64,)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
@pytest.mark.parametrize("cut", [1, 2])
def test_the_split_model_is_the_unsplit_one(backbone, cut):
    whole = initialized(tiny(backbone=backbone, cut=UNITS))
    units = {**whole.client, **whole.server}
    assert sorted(units) == ["head", "unit0", "unit1", "unit2"]
    client = {name: units.pop(name) for name in sorted(units) if name in ("unit0", "unit1")[:cut]}
    model = tiny(backbone=backbone, cut=cut)
    assert jax.tree.structure(initialized(model)) == jax.tree.structure(
        Variables(client, units, {})
    )

    expected = jax.jit(tiny(backbone=backbone, cut=UNITS).encode)(whole, images())
    actual = jax.jit(model.encode)(Variables(client, units, {}), images())
    np.testing.assert_allclose(actual.features, expected.features, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(actual.embedding, expected.embedding, rtol=1e-5, atol=1e-6)
    assert expected.features.std() > 0.05


@pytest.mark.parametrize("text", ["C4S3", "c4s2", "C0S2", "C4S2 ", "4S2", ""])
def test_other_bottlenecks_are_refused(text):
    with pytest.raises(ValueError, match="none or C<channels>S"):
        parse_bottleneck(text)


# -------------------------------------------------------------------------------------- equality


def test_equal_models_compile_once():
    @functools.partial(jax.jit, static_argnums=0)
    @chex.assert_max_traces(n=1)
    def encode(model: SplitModel, variables: Variables, images: jax.Array) -> jax.Array:
        return model.encode(variables, images).embedding

    first, second = (tiny(cut=2, bottleneck=parse_bottleneck("C4S2")) for _ in range(2))
    assert first is not second
    variables = initialized(first)
    np.testing.assert_array_equal(
        encode(first, variables, images()), encode(second, variables, images())
    )
    with pytest.raises(AssertionError, match="traced"):
        encode(tiny(cut=2, bottleneck=parse_bottleneck("C4S1")), variables, images())


CHANGES = [
    {"backbone": "resnet50"},
    {"backbone": "resnet34"},
    {"blocks_per_stage": (1, 2)},
    {"blocks_per_stage": None},
    {"width": 12},
    {"stem": "3x3s2"},
    {"cut": 2},
    {"bottleneck": parse_bottleneck("C4S2")},
    {"head": "largeV2"},
    {"head_width": 8},
    {"image_size": 12},
    {"compute_dtype": "bfloat16"},
    {"row_axes": ("clients",)},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_models_are_equal_by_value(change):
    assert tiny(**change) == tiny(**change)
    assert hash(tiny(**change)) == hash(tiny(**change))
    same = change == {"backbone": "resnet34"}  # its depth is set, and its blocks are resnet18's
    assert (tiny(**change) == tiny()) == same


# ------------------------------------------------------------------------------------------ values


def test_weight_standardisation_equals_numpy():
    kernel = np.random.default_rng(0).normal(2.0, 3.0, (3, 3, 5, 4)).astype(np.float32)
    kernel[..., 3] *= 1e-5  # where epsilon matters
    flat = kernel.reshape(-1, 4).astype(np.float64)
    expected = (flat - flat.mean(0)) / (flat.std(0, ddof=1) + 1e-5)
    actual = np.asarray(standardize(jnp.asarray(kernel))).reshape(-1, 4)
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)
    assert actual.std(0, ddof=1)[3] < 0.9


def test_the_standardised_convolution_ignores_shift_and_scale_of_its_kernel():
    module, x = StandardizedConv(6, 3, 2), images()
    kernel = module.init(jax.random.key(0), x)["params"]["kernel"]
    outputs = [module.apply({"params": {"kernel": k}}, x) for k in (kernel, 1.0 - 3.0 * kernel)]
    np.testing.assert_allclose(outputs[1], -outputs[0], rtol=1e-2, atol=2e-3)


def leaves_by_name(variables: Variables) -> dict[str, np.ndarray]:
    sides = {"client": variables.client, "server": variables.server}
    paths = jax.tree_util.tree_leaves_with_path(sides)
    return {"/".join(k.key for k in path): np.asarray(leaf) for path, leaf in paths}


def test_initial_values_are_within_and_near_their_bounds():
    variables = initialized(tiny(bottleneck=parse_bottleneck("C12S4"), head_width=64))
    for name, x in leaves_by_name(variables).items():
        assert x.dtype == np.float32
        if name.endswith("kernel"):
            fan_in = np.prod(x.shape[:-1])
            fan_out = np.prod(x.shape) / x.shape[-2]
            xavier = "bottleneck" in name or "dense" in name
            bound = np.sqrt(6 / (fan_in + fan_out)) if xavier else np.sqrt(1 / fan_in)
            assert 0.95 * bound < np.abs(x).max() <= bound * (1 + 1e-6), name
            np.testing.assert_allclose(x.std(), bound / np.sqrt(3), rtol=0.15, err_msg=name)
            assert abs(x.mean()) < 0.2 * bound, name
        else:
            np.testing.assert_array_equal(x, 1.0 if name.endswith("scale") else 0.0, err_msg=name)


def test_another_key_gives_other_kernels():
    model = tiny()
    first, second = initialized(model), jax.jit(model.init)(jax.random.key(6))
    for name, x in leaves_by_name(first).items():
        if name.endswith("kernel"):
            assert np.abs(x - leaves_by_name(second)[name]).max() > 0.01, name


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters():
    single, half = tiny(), tiny(compute_dtype="bfloat16")
    variables = initialized(single)
    assert {x.dtype for x in jax.tree.leaves(half.shapes())} == {jnp.dtype(jnp.float32)}
    latents = jax.eval_shape(half.latents, variables.client, images())
    assert latents.dtype == jnp.bfloat16

    @functools.partial(jax.jit, static_argnums=0)
    def outputs_and_gradient(model: SplitModel, variables: Variables):
        def loss(client):
            encoded = model.encode(variables._replace(client=client), images())
            return encoded.embedding[:, :5].sum(), encoded

        gradient, encoded = jax.grad(loss, has_aux=True)(variables.client)
        return *encoded, gradient["unit0"]["conv"]["kernel"]

    expected = outputs_and_gradient(single, variables)
    for a, e in zip(outputs_and_gradient(half, variables), expected, strict=True):
        assert a.dtype == jnp.float32
        assert 1e-6 < np.linalg.norm(a - e) / np.linalg.norm(e) < 0.2  # 3 digits, 4 norms


# ------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize(
    "head, backbone, widths",
    [
        ("V1", "resnet18", [(512, 128)]),
        ("V2", "resnet18", [(512, 1024), (1024, 1024)]),
        ("smallV2", "resnet18", [(512, 512), (512, 512)]),
        ("largeV2", "resnet18", [(512, 4096), (4096, 2048)]),
        ("V2", "resnet50", [(2048, 4096), (4096, 1024)]),
        ("largeV2", "resnet50", [(2048, 4096), (4096, 2048)]),
    ],
)
def test_heads_have_the_papers_widths(head, backbone, widths):
    variables = paper(backbone, head=head, head_width=HEADS[head].width).shapes()
    tree = variables.server["head"]
    dense = [tree[f"dense{i + 1}"]["kernel"].shape for i in range(len(widths))]
    assert dense == widths
    assert ("norm" in tree) == (head == "largeV2") == bool(variables.stats)


ROWS, FEATURES, HIDDEN, WIDTH = 6, 5, 8, 4


def large_head():
    head = Head(WIDTH, HIDDEN, batch_norm=True, dtype=jnp.float32)
    rng = np.random.default_rng(1)
    features = jnp.asarray(rng.normal(size=(ROWS, FEATURES)), jnp.float32)
    variables = head.init(jax.random.key(0), features, jnp.ones(ROWS, bool), False)
    return head, jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.5, 1.5, x.shape), jnp.float32), variables
    )


def large_head_numpy(variables, features, mean=None, var=None):
    """By hand in float64; mean and variance of the rows unless given."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    x = np.asarray(features, np.float64) @ params["dense1"]["kernel"] + params["dense1"]["bias"]
    mean, var = (x.mean(0), x.var(0)) if mean is None else (mean, var)
    y = (x - mean) / np.sqrt(var + 1e-5) * params["norm"]["scale"] + params["norm"]["bias"]
    y = np.maximum(y, 0) @ params["dense2"]["kernel"] + params["dense2"]["bias"]
    return y, mean, var


@pytest.mark.parametrize("mask", [[True] * 6, [True, False, True, True, False, True]])
def test_batch_norm_head_uses_the_rows_that_count(mask):
    head, variables = large_head()
    apply = jax.jit(head.apply, static_argnums=3, static_argnames="mutable")
    features = np.random.default_rng(2).normal(1.0, 2.0, (ROWS, FEATURES)).astype(np.float32)
    kept = np.array(mask)
    expected, mean, var = large_head_numpy(variables, features[kept])
    output, updated = apply(
        variables, jnp.asarray(features), jnp.asarray(mask), True, mutable=("batch_stats",)
    )
    np.testing.assert_allclose(np.asarray(output)[kept], expected, rtol=1e-4, atol=1e-4)
    before, after = variables["batch_stats"]["norm"], updated["batch_stats"]["norm"]
    np.testing.assert_allclose(after["mean"], 0.9 * before["mean"] + 0.1 * mean, rtol=1e-4)
    unbiased = var * kept.sum() / (kept.sum() - 1)
    np.testing.assert_allclose(after["var"], 0.9 * before["var"] + 0.1 * unbiased, rtol=1e-4)


def test_batch_norm_head_evaluates_with_running_statistics():
    head, variables = large_head()
    features = jnp.asarray(np.random.default_rng(2).normal(size=(2, FEATURES)), jnp.float32)
    stats = jax.tree.map(np.asarray, variables["batch_stats"]["norm"])
    expected, *_ = large_head_numpy(variables, features, stats["mean"], stats["var"])
    output = head.apply(variables, features, jnp.ones(2, bool), False)
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)


def test_a_batch_norm_head_normalises_each_view_by_itself():
    model = tiny(head="largeV2", cut=UNITS)  # the server only pools
    variables, rng = initialized(model), np.random.default_rng(3)
    views = [jnp.asarray(rng.normal(m, 1, (ROWS, 2, 2, 16)), jnp.float32) for m in (0, 5)]
    mask = jnp.asarray([True, True, False, True, True, True])
    both = embed_views(model, variables.server, variables.stats, tuple(views), mask)
    stats = variables.stats
    for view, unit in zip(views, both.unit, strict=True):
        alone = embed_views(model, variables.server, stats, (view,), mask)
        np.testing.assert_allclose(unit, alone.unit[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-5)
        stats = alone.stats
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), both.stats, stats)
    together = embed_views(
        model, variables.server, variables.stats, (jnp.concatenate(views),), jnp.tile(mask, 2)
    )
    assert np.abs(together.unit[0][:ROWS] - both.unit[0]).max() > 0.1

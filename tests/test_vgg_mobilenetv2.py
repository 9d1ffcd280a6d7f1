"""VGG and MobileNetV2: counts, shapes and widths by their tables; cuts, clients and training."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.config import check_types, default_config
from mocosfl_jax.config.checks import check_fields
from mocosfl_jax.errors import InputError
from mocosfl_jax.main import main
from mocosfl_jax.models import mobilenetv2
from mocosfl_jax.models.backbones import check_network, latent_shape, num_units, units_of
from mocosfl_jax.models.bottleneck import parse_bottleneck
from mocosfl_jax.models.contract import Network, NetworkError
from mocosfl_jax.models.mobilenetv2 import Stage
from mocosfl_jax.models.split import SplitModel, Variables, build_model
from mocosfl_jax.models.vgg import MaxPool
from tests import tiny
from tests.test_config import resolved

CONFIG = str(Path(__file__).parent.parent / "configs" / "cifar10.py")
VGG = {  # Simonyan & Zisserman 2015, table 1; M pools
    "vgg11": "64 M 128 M 256 256 M 512 512 M 512 512 M",
    "vgg13": "64 64 M 128 128 M 256 256 M 512 512 M 512 512 M",
    "vgg16": "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M",
    "vgg19": "64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512 M",
}
BLOCKS = "16,1 24,1 24,1 32,2 32,1 32,1 64,2 64,1 64,1 64,1 96,1 96,1 96,1 160,2 160,1 160,1 320,1"
FAMILIES = ["vgg11", "mobilenetv2"]


@pytest.fixture
def short(monkeypatch):
    """MobileNetV2 with two blocks of all kinds in place of 17, which compile for a minute."""
    monkeypatch.setattr(mobilenetv2, "STAGES", (Stage(1, 16, 1, 1), Stage(6, 24, 1, 2)))


def model_of(backbone: str, cut: int, width: int = 4, size: int = 8, **changes) -> SplitModel:
    others = {"bottleneck": None, "head": "V2", "head_width": 8, "image_size": size, **changes}
    return build_model(Network(backbone, width), cut=cut, **others)


def count(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def images(*lead: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(*lead, 8, 8, 3)), jnp.float32)


@pytest.mark.parametrize("backbone", VGG)
@pytest.mark.parametrize("size, width", [(32, 64), (9, 4)])
def test_units_and_latents_of_a_vgg_are_its_list(backbone, size, width):
    network, expected, side, channels = Network(backbone, width), [], size, 3
    for entry in VGG[backbone].split():
        if entry == "M":
            side = math.ceil(side / 2)
        else:
            channels = int(entry) * width // 64
        expected.append((side, side, channels))
    cuts = range(1, num_units(network) + 1)
    assert [latent_shape(network, size, cut) for cut in cuts] == expected


@pytest.mark.parametrize("size", [32, 9])
def test_units_and_latents_of_mobilenetv2_are_its_table(size):
    side, expected = size, [(size, size, 32)]
    for block in BLOCKS.split():
        channels, stride = map(int, block.split(","))
        side = math.ceil(side / stride)
        expected.append((side, side, channels))
    expected.append((side, side, 1280))
    network = Network("mobilenetv2", 32)
    assert [latent_shape(network, size, cut) for cut in range(1, 20)] == expected
    assert num_units(network) == 19


PROJECTED = ((32, 16), (16, 24), (64, 96), (160, 320))  # shortcuts that torchvision lacks


@pytest.mark.parametrize(
    "backbone, torchvision",  # with BatchNorm, without the classifier
    [
        ("vgg11", 9_225_984),
        ("vgg13", 9_410_880),
        ("vgg16", 14_723_136),
        ("vgg19", 20_035_392),
        # and without the 1x1 convolution of the first block, which expands by 1
        ("mobilenetv2", 2_223_872 + 32 * 32 + 2 * 32 + sum(a * b + 2 * b for a, b in PROJECTED)),
    ],
)
def test_backbones_have_torchvisions_parameters(backbone, torchvision):
    model = model_of(backbone, cut=3, width=32 if backbone == "mobilenetv2" else 64, size=32)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    units = count(variables.client) + count(variables.server) - count(variables.server["head"])
    assert units == torchvision


@pytest.mark.parametrize(
    "width, expected",  # of torchvision at 0.25, 0.5 and 0.75; by hand at 0.125 and 1.5
    [
        (4, [4, 8, 8, 8, 8, 16, 24, 40, 1280]),
        (8, [8, 8, 8, 8, 16, 24, 40, 80, 1280]),
        (16, [16, 8, 16, 16, 32, 48, 80, 160, 1280]),
        (24, [24, 16, 24, 24, 48, 72, 120, 240, 1280]),
        (48, [48, 24, 40, 48, 96, 144, 240, 480, 1920]),
    ],
)
def test_channels_of_mobilenetv2_are_rounded_as_ever(width, expected):
    features = [unit.features for unit in units_of(Network("mobilenetv2", width), 32)]
    firsts = [0, 1, 2, 4, 7, 11, 14, 17, 18]  # of each row of the table
    assert [features[k] for k in firsts] == expected


@pytest.mark.parametrize("backbone", [*VGG, "mobilenetv2"])
def test_widths_that_are_refused(backbone):
    most = (2**31 - 1) // (40 if backbone == "mobilenetv2" else 8) // 4 * 4
    check_network(Network(backbone, most), cut=1)
    for width in (6, most + 4, 2**31 - 4):
        with pytest.raises(NetworkError, match=r"^width: .*(needed|4 to \d+)"):
            check_network(Network(backbone, width), cut=1)


@pytest.mark.parametrize(
    "fields", [{"stem": "3x3s1"}, {"blocks_per_stage": (1, 1)}, {"cut": 20}, {"width": 6}]
)
@pytest.mark.parametrize("backbone", FAMILIES)
def test_a_field_that_does_not_fit_is_named(backbone, fields):
    raw = default_config()
    raw.update(backbone=backbone, **fields)
    with pytest.raises(InputError, match=rf"^config\.{next(iter(fields))} = [^\n]*$"):
        check_fields(check_types(raw))


def test_an_unset_width_is_the_published_one():
    assert [resolved(backbone=b).width for b in ("resnet50", *VGG, "mobilenetv2")] == [64] * 5 + [
        32
    ]
    assert resolved(backbone="mobilenetv2", width=16).width == 16


@pytest.mark.parametrize("side", [1, 2, 5])
def test_pooling_keeps_the_largest_and_its_gradient(side):
    x = np.random.default_rng(side).normal(size=(2, side, side + 1, 3)).astype(np.float32)
    rows, columns = math.ceil(side / 2), math.ceil((side + 1) / 2)
    g = np.random.default_rng(9).normal(size=(2, rows, columns, 3)).astype(np.float32)
    out, dx = np.zeros_like(g), np.zeros_like(x)
    for b, row, column, c in np.ndindex(g.shape):
        window = x[b, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2, c]
        i, j = np.unravel_index(window.argmax(), window.shape)
        out[b, row, column, c] = window[i, j]
        dx[b, 2 * row + i, 2 * column + j, c] = g[b, row, column, c]
    value, pull = jax.vjp(lambda x: MaxPool().apply({}, x), jnp.asarray(x))
    np.testing.assert_array_equal(value, out)
    np.testing.assert_array_equal(pull(jnp.asarray(g))[0], dx)


@pytest.mark.parametrize("backbone, cuts", [("vgg11", (1, 2, 13)), ("mobilenetv2", (2, 4))])
def test_a_network_is_the_same_at_every_cut(backbone, cuts, short):
    """Before and after a pooling, and with all units on the client."""
    whole = jax.jit(model_of(backbone, cuts[-1]).init)(jax.random.key(0))
    expected = jax.jit(model_of(backbone, cuts[-1]).encode)(whole, images(2))
    assert list(whole.server) == ["head"]
    for cut in cuts[:-1]:
        model = model_of(backbone, cut)
        names = {f"unit{k}" for k in range(cut)} & whole.client.keys()
        client = {name: whole.client[name] for name in names}
        rest = {name: x for name, x in whole.client.items() if name not in names}
        variables = Variables(client, rest | whole.server, {})
        needed = jax.eval_shape(model.init, jax.random.key(0))
        assert jax.tree.structure(variables) == jax.tree.structure(needed)
        actual = jax.jit(model.encode)(variables, images(2))
        np.testing.assert_allclose(actual.embedding, expected.embedding, rtol=1e-4, atol=1e-5)
    assert expected.embedding.std() > 0.05


@pytest.mark.parametrize("backbone, cut", [("vgg11", 2), ("mobilenetv2", 4)])
def test_a_bottleneck_gives_back_what_it_took(backbone, cut):
    model = model_of(backbone, cut, size=16, bottleneck=parse_bottleneck("C4S2"))
    variables = jax.eval_shape(model.init, jax.random.key(0))
    side, _, channels = latent_shape(Network(backbone, 4), 16, cut)
    one = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    sent = jax.eval_shape(model.latents, variables.client, one)
    assert sent.shape == (1, side // 2, side // 2, 4)
    assert variables.server["bottleneck"]["conv1"]["bias"].shape == (channels,)


@pytest.mark.parametrize("backbone, cut", [("vgg11", 3), ("mobilenetv2", 3)])
def test_mapped_clients_are_a_loop_over_them(backbone, cut, short):
    model = model_of(backbone, cut)
    keys = jax.random.split(jax.random.key(0), 3)
    clients = jax.jit(jax.vmap(lambda key: model.init(key).client))(keys)

    def gradient(client, images):
        return jax.grad(lambda p: jnp.sum(jnp.sin(model.latents(p, images))))(client)

    x = images(3, 2)
    actual = jax.jit(jax.vmap(gradient))(clients, x)
    one = jax.jit(gradient)
    for i in range(3):
        expected = one(jax.tree.map(lambda a, i=i: a[i], clients), x[i])
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a[i], e, rtol=1e-3, atol=1e-4 * float(np.abs(e).max()))


@pytest.mark.parametrize("backbone, cut", [("vgg11", 2), ("mobilenetv2", 2)])
def test_a_run_of_each_family(backbone, cut, tmp_path, short):
    fields = {"backbone": backbone, "cut": cut, "steps_per_round": 2, "steps_per_dispatch": 2}
    fields |= {"rounds": 1, "holdout_fraction": 0.0, "loss": "one_way"}
    npz = tiny.write_unevaluated(tmp_path / "images.npz")
    flags = [f for f in tiny.flags(npz, **fields) if "blocks_per_stage" not in f]
    run = npz.parent / "run"
    assert main(["main", "--config", CONFIG, "--workdir", str(run), *flags]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["loss"] < 20 for line in lines if "loss" in line)
    assert json.loads((run / "summary.json").read_text())["steps"] == 2

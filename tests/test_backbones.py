"""The table of backbones: what follows from it, against plain loops; what it refuses."""

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from mocosfl_jax.models.backbones import (
    BACKBONES,
    check_network,
    default_fields,
    latent_shape,
    num_units,
)
from mocosfl_jax.models.contract import Backbone, Network, NetworkError
from mocosfl_jax.models.split import build_model
from mocosfl_jax.models.units import ConvUnit

BLOCKS = {  # He et al. 2016, table 1
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}


def expected_latents(blocks, expansion, width, stem_stride, size) -> list[tuple[int, int, int]]:
    """Height, width and channels after every unit of a ResNet, by a plain loop."""
    size = math.ceil(size / stem_stride)
    shapes = [(size, size, width)]
    for stage, count in enumerate(blocks):
        for block in range(count):
            if stage > 0 and block == 0:
                size = math.ceil(size / 2)
            shapes.append((size, size, expansion * width * 2**stage))
    return shapes


def test_the_table_has_the_families():
    vggs = ["vgg11", "vgg13", "vgg16", "vgg19"]
    assert list(BACKBONES) == [*BLOCKS, *vggs, "mobilenetv2"]


@pytest.mark.parametrize("backbone", BLOCKS)
@pytest.mark.parametrize("size, stem", [(32, "3x3s1"), (64, "3x3s2"), (224, "7x7s2")])
def test_units_and_latents_of_a_resnet_follow_from_the_table(backbone, size, stem):
    network = Network(backbone, 64)
    assert default_fields(backbone, size) == {"blocks_per_stage": BLOCKS[backbone], "stem": stem}
    expansion = 1 if backbone in ("resnet18", "resnet34") else 4
    expected = expected_latents(BLOCKS[backbone], expansion, 64, int(stem[-1]), size)
    cuts = range(1, num_units(network) + 1)
    assert [latent_shape(network, size, cut) for cut in cuts] == expected
    assert latent_shape(network, size, 0) == (size, size, 3)


@pytest.mark.parametrize("backbone, expansion", [("resnet18", 1), ("resnet50", 4)])
@pytest.mark.parametrize("size", [7, 8, 33])
def test_fields_that_are_set_decide(backbone, expansion, size):
    network = Network(backbone, 12, (1, 2, 1), "7x7s2", "bfloat16")
    expected = expected_latents((1, 2, 1), expansion, 12, 2, size)
    assert num_units(network) == len(expected) == 5
    for cut, shape in enumerate(expected, start=1):
        assert latent_shape(network, size, cut) == shape


def test_shapes_take_no_compilation(caplog):
    network = Network("resnet18", 20)  # a width of this test alone
    with jax.log_compiles():
        assert latent_shape(network, 32, 9) == (4, 4, 160)
        assert "XLA compilation" not in caplog.text
        jax.jit(lambda x: x + 20)(1)
        assert "XLA compilation" in caplog.text


def test_latents_are_known_however_large_the_network_is():
    widest = Network("resnet18", 2**28 - 4)
    check_network(widest, cut=9)
    side = 2**31 // 16  # the stem and three of four stages halve
    assert latent_shape(widest, 2**31 - 1, 9) == (side, side, 8 * (2**28 - 4))


@pytest.mark.parametrize(
    "field, network, cut",
    [
        ("width", Network("resnet18", 30), 1),
        ("width", Network("resnet18", 2**28), 1),
        ("width", Network("resnet50", 2**26), 1),
        ("width", Network("resnet18", 2**31 - 4), 1),
        ("blocks_per_stage", Network("resnet18", 64, (1,) * 9), 1),
        ("blocks_per_stage", Network("resnet18", 64, (50, 51)), 1),
        ("blocks_per_stage", Network("resnet18", 64, (10**400,)), 1),
        ("cut", Network("resnet18", 64), 10),
        ("cut", Network("resnet50", 64, (1, 1)), 4),
        ("cut", Network("resnet18", 64), 0),
    ],
)
def test_networks_that_are_refused(field, network, cut):
    with pytest.raises(NetworkError) as error:
        check_network(network, cut)
    assert error.value.field == field
    assert "needed" in error.value.allowed or " to " in error.value.allowed


@pytest.mark.parametrize(
    "network, cut",
    [
        (Network("resnet18", 2**28 - 4), 9),
        (Network("resnet50", 2**26 - 4), 17),
        (Network("resnet18", 4, (1,) * 8), 9),
        (Network("resnet18", 4, (50, 50)), 101),
    ],
)
def test_networks_that_are_just_allowed(network, cut):
    check_network(network, cut)


def stem_units(network: Network):
    return tuple(ConvUnit(network.width * 2**i, 3, 2, jnp.float32) for i in range(3))


@pytest.fixture
def stems(monkeypatch) -> str:
    """A family that has neither stages nor a choice of stems: one line of the table."""
    made = Backbone(stem_units, defaults=lambda size: {}, check=lambda network: None)
    monkeypatch.setitem(BACKBONES, "stems", made)
    return "stems"


def test_another_family_is_one_line_of_the_table(stems):
    network = Network(stems, 8)
    assert [latent_shape(network, 20, cut) for cut in range(4)] == [
        (20, 20, 3),
        (10, 10, 8),
        (5, 5, 16),
        (3, 3, 32),
    ]
    check_network(network, cut=3)
    model = build_model(network, cut=2, bottleneck=None, head="V2", head_width=16, image_size=20)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    assert sorted(variables.client) == ["unit0", "unit1"]
    assert sorted(variables.server) == ["head", "unit2"]
    assert variables.server["head"]["dense1"]["kernel"].shape == (32, 16)
    images = jax.ShapeDtypeStruct((5, 20, 20, 3), jnp.float32)
    latents = jax.eval_shape(model.latents, variables.client, images)
    assert latents.shape == (5, 5, 5, 16)
    assert jax.eval_shape(model.features, variables.server, latents).shape == (5, 32)


@pytest.mark.parametrize("field, value", [("blocks_per_stage", (1, 1)), ("stem", "3x3s1")])
def test_a_field_that_the_family_does_not_read_is_refused(stems, field, value):
    with pytest.raises(
        NetworkError, match="backbone 'stems' does not read it: leave it unset"
    ) as error:
        check_network(Network(stems, 8, **{field: value}), cut=1)
    assert error.value.field == field


@pytest.mark.parametrize(
    "module, absent",
    [
        ("client_net", ("server_net", "heads", "split", "backbones")),
        ("server_net", ("client_net", "heads", "split", "backbones")),
    ],
)
def test_each_side_is_imported_without_the_other(module, absent):
    program = f"import sys, mocosfl_jax.models.{module}; print(*sys.modules, sep='\\n')"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    ours = {name for name in result.stdout.split() if name.startswith("mocosfl_jax.")}
    assert f"mocosfl_jax.models.{module}" in ours
    assert all(name.startswith("mocosfl_jax.models") for name in ours)
    assert not ours & {f"mocosfl_jax.models.{name}" for name in absent}

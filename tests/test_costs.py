"""What a client costs, against counts by hand and Table 1 of the paper."""

import dataclasses
import errno
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.config import Resolved, check_types, default_config, resolve
from mocosfl_jax.costs.__main__ import main
from mocosfl_jax.costs.communication import KINDS, total
from mocosfl_jax.costs.flops import Flops, flops_of
from mocosfl_jax.costs.paper import MB, G
from mocosfl_jax.costs.report import Costs, costs_of
from mocosfl_jax.data.dataset import DatasetInfo
from mocosfl_jax.federated.contract import Work
from mocosfl_jax.models.conv import conv, conv_transpose2x
from mocosfl_jax.run.program import program_of
from tests import tiny

CONFIG = str(Path(__file__).parent.parent / "configs" / "cifar10.py")
CIFAR10 = DatasetInfo("cifar10", 50_000, 10_000, 32, 10)
STEM = 32 * 32 * 3 * 3 * 3 * 64  # multiply-adds of an image, ResNet-18
BLOCK = 2 * (32 * 32 * 3 * 3 * 64 * 64)
BOTTLENECK = 16 * 16 * 3 * 3 * 64 * 4  # C4S2
NARROW = {"width": 4, "blocks_per_stage": (1,), "head_width": 8, "num_clients": 5, "batch_size": 3}
SAVING = ("--config.saving.threshold=0.1", "--config.saving.warmup_rounds=0")
FROZEN = {"client_learning_rate": 0.0, "client_state": "stateless", "align_momentum": True}


def setting(method: str = "mocosfl", **fields) -> Resolved:
    raw = default_config(method)
    raw.update_from_flattened_dict(fields)
    return resolve(check_types(raw), CIFAR10)


@functools.cache
def costs(method: str = "mocosfl", **fields) -> Costs:
    config = setting(method, **fields)
    return costs_of(config, config.num_clients, compiled=False)


def work(function, *shapes, dtype=jnp.float32) -> Work:
    return Work(function, tuple(jax.ShapeDtypeStruct(s, dtype) for s in shapes), replaces=False)


# ------------------------------------------------------------------------------------ operations


def test_products_and_other_operations_by_hand():
    def function(x, y, z):
        return jnp.sum(jnp.exp(x) @ y) + jnp.maximum(z, 0.0)

    found = flops_of(work(function, (3, 5), (5, 7), (11,)))
    assert found == Flops(products=3 * 5 * 7, others=3 * 5 + 3 * 7 + 11 + 11)
    assert found.total == 2 * 105 + 58


def test_integers_count_nothing():
    assert flops_of(work(lambda x: jnp.sum(x * 2), (3, 5), dtype=jnp.int32)) == Flops()


def test_loops_count_each_turn_and_branches_the_worst():
    def loop(x, y):
        return jax.lax.scan(lambda carry, row: (jax.nn.relu(carry @ y), row * 2), x, jnp.ones(4))

    assert flops_of(work(loop, (3, 5), (5, 5))) == Flops(4 * 75, 4 * (15 + 1))

    def branches(x, y):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ y, lambda: x @ y @ y)

    assert flops_of(work(branches, (3, 5), (5, 5))).products == 2 * 75


def test_what_nothing_depends_on_counts_nothing():
    def function(x, y):
        _ = jnp.exp(x @ y)
        return x + 1

    assert flops_of(work(function, (3, 5), (5, 7))) == Flops(others=15)


@pytest.mark.parametrize(
    ("function", "image", "output", "kernel"),
    [
        (lambda x, k: conv(x, k, 1), (2, 6, 4, 3), (2, 6, 4, 5), (3, 3, 3, 5)),
        (lambda x, k: conv(x, k, 2), (2, 7, 5, 3), (2, 4, 3, 5), (3, 3, 3, 5)),
        (lambda x, k: conv(x, k, 2), (2, 6, 4, 3), (2, 3, 2, 5), (1, 1, 3, 5)),
        (conv_transpose2x, (2, 3, 4, 3), (2, 6, 8, 5), (3, 3, 3, 5)),
    ],
)
def test_a_convolution_forward_and_backward(function, image, output, kernel):
    """Each gradient takes as many products as the forward pass, whatever the stride; a transposed
    convolution as many as the convolution that it transposes."""
    pixels = np.prod((image if function is conv_transpose2x else output)[:3])
    products = int(pixels * np.prod(kernel))
    forward = work(function, image, kernel)
    assert flops_of(forward) == Flops(products)

    def backward(x, k, g):
        return jax.vjp(function, x, k)[1](g)

    # In parts, the kernel gradient adds up the parts.
    assert flops_of(work(backward, image, kernel, output)).products == 2 * products

    def of_kernel(x, k, g):
        return jax.vjp(lambda k: function(x, k), k)[1](g)

    assert flops_of(work(of_kernel, image, kernel, output)).products == products


def test_groups_and_dilation_of_other_convolutions():
    def depthwise(x, k):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=dims, feature_group_count=6
        )

    found = flops_of(work(depthwise, (2, 5, 4, 6), (3, 3, 1, 6)))
    assert found == Flops(2 * 5 * 4 * 9 * 6)


# ---------------------------------------------------------------------------------- a step, by hand


@pytest.mark.parametrize(
    ("fields", "products"),
    [
        # Forward of both views and the kernel's gradient; from the second layer on its input's too.
        ({"cut": 1}, 2 * 3 * STEM),
        ({"cut": 2}, 2 * (3 * STEM + 4 * BLOCK)),
        ({"cut": 1, "loss": "client"}, 2 * 2 * 3 * STEM),
        ({"cut": 2, "bottleneck": "C4S2"}, 2 * (3 * STEM + 4 * BLOCK + 4 * BOTTLENECK)),
        ({"cut": 2, "bottleneck": "C4S2", **FROZEN}, 2 * 2 * (STEM + BLOCK + BOTTLENECK)),
    ],
)
def test_products_of_a_step_by_hand(fields, products):
    found = costs(num_clients=50, batch_size=2, **fields)
    assert found.step.products == products
    assert found.image.products * 2 * 2 <= products
    assert 0 < found.step.others < products


def test_a_defence_is_in_the_work():
    plain, clipped = costs(**NARROW), costs(**NARROW, **{"clip.norm": 1.0})
    assert clipped.step.others > plain.step.others
    assert clipped.step.products == plain.step.products
    attacked = costs(**NARROW, **{"ressfl.alpha": 2.0, "ressfl.decoder": "res_normN0C4"})
    assert attacked.step.products > 2 * plain.step.products


def test_a_client_with_the_whole_network():
    """Its `step` with one slot: one view, forward and backward."""
    found = costs("tests.toy_method:TOY", steps_per_round=10, rounds=4, **NARROW)
    stem = 32 * 32 * 27 * 4
    others = 2 * (32 * 32 * 9 * 4 * 4) + 4 * 8 + 8 * 8
    assert found.image.products == stem + others
    assert found.step.products == 3 * (2 * stem + 3 * others)
    assert found.flops == 4 * 10 * found.step.total


# --------------------------------------------------------------------------------- communication


def test_bytes_by_kind_by_hand():
    """20 clients, 5 a round: a client takes part in a quarter of the rounds."""
    found = costs(
        num_clients=20,
        cohort_size=5,
        batch_size=2,
        steps_per_round=6,
        rounds=8,
        syncs_per_round=3,
        bottleneck="C4S2",
        align_momentum=True,
    )
    latents, model = 2 * 16 * 16 * 4 * 4, 2 * 4 * (1_856 + 2_308)
    assert found.parameters == 1_856 + 2_308
    assert dataclasses.astuple(found.often) == (2, 12, 6)
    wanted = {
        ("latents", True): 2 * 12 * latents,
        ("latents", False): 0,
        ("gradients", True): 0,
        ("gradients", False): 12 * latents,
        ("weights", True): 6 * model,
        ("weights", False): 6 * model,
    }
    assert {key: total(found.messages, *key) for key in wanted} == wanted


def test_frozen_clients_receive_weights_once():
    found = costs(num_clients=1000, cut=2, bottleneck="C4S2", **FROZEN)
    assert total(found.messages, "weights", up=False) == 4 * (75_840 + 2_308)
    assert total(found.messages, "weights", up=True) == 0
    assert total(found.messages, "gradients", up=False) == 0


# ------------------------------------------------------------------------------- the paper's table


@pytest.mark.parametrize(
    ("fields", "weights", "latents", "weights_in_full", "latents_in_full"),
    [
        ({"cut": 1}, 1.4, 5_000, 2.8, 7_500),
        ({"cut": 2}, 57.9, 5_000, 115.7, 7_500),
        ({"cut": 2, "bottleneck": "C4S2", **FROZEN}, 0, 39.1, 0.3, 78.1),
    ],
)
def test_communication_of_the_papers_table(
    fields, weights, latents, weights_in_full, latents_in_full
):
    """1,000 clients of 50 images, 200 epochs."""
    found = costs(num_clients=1000, **fields)
    assert round(found.paper.weights / MB, 1) == weights
    assert round(found.paper.latents / MB, 1) == latents
    both = [sum(total(found.messages, kind, up) for up in (True, False)) for kind in KINDS]
    assert round(both[2] / MB, 1) == weights_in_full
    assert round((both[0] + both[1]) / MB, 1) == latents_in_full


def test_operations_of_taressfl_in_the_papers_table():
    found = costs(num_clients=1000, cut=2, bottleneck="C4S2", **FROZEN)
    assert found.paper.flops_an_image == STEM + BLOCK + BOTTLENECK + 5 * (3 * 32 * 32 * 64)
    assert round(found.paper.flops / G) == 734
    trained = costs(num_clients=1000, cut=2, bottleneck="C4S2")
    assert trained.paper.flops == 3 * found.paper.flops


def test_depthwise_products_count_in_the_papers_way():
    """Stem, then blocks of stride 1, 1 and 1 with 8, 48 and 144 hidden channels at width 8."""
    found = costs(backbone="mobilenetv2", cut=4, width=8, num_clients=1000)
    pixels, products, norms = 32 * 32, 27 * 8, 8
    # (channels in, hidden, out, projected shortcut) of units 1 to 3
    for c_in, hidden, out, projected in ((8, 8, 8, False), (8, 48, 8, False), (8, 48, 8, False)):
        products += c_in * hidden + 9 * hidden + hidden * out + projected * c_in * out
        norms += 2 * hidden + out + projected * out
    assert found.paper.flops_an_image == pixels * (products + 5 * norms)


@pytest.fixture(scope="module")
def whole_network() -> Costs:
    """5 clients of 10,000 images, 100 rounds of 5 epochs; 125 images a step divide an epoch."""
    fields = {"num_clients": 5, "batch_size": 125, "steps_per_round": 400, "rounds": 100}
    return costs("tests.toy_method:TOY", head="largeV2", **fields)


def test_the_whole_network_of_the_papers_table(whole_network):
    """Weights in one direction, running statistics of the head among them; T is 1000 G."""
    assert whole_network.parameters == 21_677_120 - 2 * 4_096
    assert round(whole_network.paper.weights / MB) == 8_269
    assert whole_network.paper.latents == 0
    assert round(whole_network.paper.flops / G / 1000) == 7_949
    assert round(whole_network.paper.flops / G / 1000 / 200) == 40  # 50 images
    both = sum(total(whole_network.messages, "weights", up) for up in (True, False))
    assert round(both / MB) == 16_538


# -------------------------------------------------------------------------------------- memory


def test_memory_holds_what_goes_in_and_out():
    """State is replaced, so that it counts once; frozen clients hold one model."""
    fields = {"num_clients": 4, "batch_size": 3, "width": 8, "cut": 2}
    config = setting(**fields)
    found = costs_of(config, 4)
    model = 4 * (27 * 8 + 16 + 2 * (9 * 8 * 8 + 16))
    image, latents = 4 * 32 * 32 * 3, 4 * 32 * 32 * 8
    training, inference = found.training, found.inference
    assert training.arguments == 3 * model + 2 * 3 * image + 3 * latents
    assert training.reused == 3 * model
    assert 0 <= training.outputs - training.reused - 2 * 3 * latents < 300  # pointers to arrays
    assert training.temporaries >= 3 * 4 * latents  # what the backward pass keeps
    assert inference.arguments == model + image
    assert inference.outputs == latents
    assert inference.reused == 0
    for memory in (training, inference):
        parts = memory.arguments + memory.outputs + memory.temporaries - memory.reused
        assert memory.total == parts

    frozen = costs_of(setting(**fields, **FROZEN), 4)
    assert frozen.training.arguments == model + 2 * 3 * image
    assert frozen.training.total < training.total / 2


# --------------------------------------------------------------------------------- the command


def command(npz: Path, *overrides: str) -> list[str]:
    return ["costs", "--config", CONFIG, *tiny.flags(npz), *overrides]


def test_the_command_prints_a_table_and_writes_numbers(npz, capsys):
    """A client of four, of 3 rounds of 6 steps with 2 syncs; three images a step."""
    file = npz.parent / "costs.json"
    assert main(command(npz, f"--json={file}")) == 0
    out = capsys.readouterr().out
    assert "116 parameters, 3 images a step, 3 rounds, 18 steps, 6 syncs" in out
    found = json.loads(file.read_text())
    latents = 3 * 8 * 8 * 4 * 4
    assert found["bytes"] == {
        "latents": {"up": 2 * 18 * latents, "down": 0},
        "gradients": {"up": 0, "down": 18 * latents},
        "weights": {"up": 6 * 4 * 116, "down": 6 * 4 * 116},
    }
    assert found["step"]["products"] == 3 * 3 * (8 * 8 * 27 * 4)
    assert found["flops"] == 18 * (2 * found["step"]["products"] + found["step"]["others"])
    assert found["training"]["arguments"] > found["inference"]["arguments"] > 0
    assert "mean" not in out and "full rounds" not in out


def test_what_the_numbers_leave_open_is_said(npz, capsys):
    assert main(command(npz, "--config.cohort_size=3", *SAVING)) == 0
    *_, mean, saving = filter(None, capsys.readouterr().out.splitlines())
    assert mean == "a round draws 3 of 4 clients: rounds, and what follows, are a client's mean"
    assert saving.startswith("counted with all rounds in A (full rounds); summary.json says what")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--config.cut=9"], ["config.cut", "9", "1 to 3"]),
        (["--config.num_clients=61"], ["config.num_clients", "61"]),
        (["--json=/no/such/folder/x.json"], ["--json", "/no/such/folder"]),
        (["--workdir=x"], ["workdir"]),
        (["stray"], ["stray"]),
    ],
)
def test_bad_input_is_refused_in_one_line(npz, capsys, overrides, words):
    assert main(command(npz, *overrides)) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert all(word in err for word in words)


def test_a_folder_is_no_file_for_the_numbers(npz, capsys):
    folder = npz.parent / "folder"
    folder.mkdir()
    assert main(command(npz, f"--json={folder}")) == 2
    out, err = capsys.readouterr()
    assert out == "" and str(folder) in err and len(err.splitlines()) == 1


def test_a_file_that_cannot_be_written_is_named(npz, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(os, "replace", full)
    path = npz.parent / "costs.json"
    assert main(command(npz, f"--json={path}")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and "no room" in line


def test_the_module_runs_and_needs_a_config():
    result = subprocess.run(
        [sys.executable, "-m", "mocosfl_jax.costs"], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and "--config" in result.stderr


@pytest.mark.parametrize("method", ["mocosfl", "tests.toy_method:TOY"])
def test_a_step_gives_a_state_of_the_same_form(method):
    """What `Memory` counts once."""
    config = setting(method, steps_per_round=10, **NARROW)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    train = program_of(config).method.client_work(images).train
    assert train.replaces
    assert jax.eval_shape(train.function, *train.arguments)[0] == train.arguments[0]

"""The FLOP formula against a count of the traced network, and a short run of the benchmark."""

import jax
import numpy as np
import pytest

from benchmarks import clients, gpu
from benchmarks.devices import random_images
from benchmarks.step import measure, setting, step_flops, unit_products
from mocosfl_jax.config.network import model_of
from mocosfl_jax.models import conv


def traced_products(jaxpr) -> int:
    """Multiply-adds of the convolutions in a jaxpr, inner ones included."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            total += int(np.prod(equation.outvars[0].aval.shape) * np.prod(kernel[:-1]))
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            total += traced_products(inner) if hasattr(inner, "eqns") else 0
    return total


def test_products_of_resnet18_are_those_of_the_traced_network(monkeypatch):
    monkeypatch.setattr(conv, "on_cpu", lambda: False)  # Winograd's form takes fewer
    jax.clear_caches()  # of what other tests traced
    config = setting(num_clients=100)
    model = model_of(config)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    jaxpr = jax.make_jaxpr(model.encode)(variables, images).jaxpr
    assert sum(unit_products(config)) == traced_products(jaxpr)


def test_flops_of_a_step_by_hand():
    """100 rows; stem 1.77 M, the rest 553.6 M, head 1.57 M, logits 6.1 M multiply-adds."""
    config = setting(num_clients=100)
    stem, *rest = unit_products(config)
    head, logits = 512 * 1024 + 1024 * 1024, 1024 * 6001
    # stem: forward, kernel gradient, momentum forward; server: 2 views * (3 + 1) forwards;
    # logits: 2 losses * (forward and the gradient of the query)
    expected = 200 * (3 * stem + 8 * (sum(rest) + head) + 4 * logits)
    assert step_flops(config) == expected


def test_a_short_run_gives_every_figure():
    small = {"width": 4, "blocks_per_stage": (1,), "head_width": 8, "queue_length": 400}
    figures = measure(cut=1, repeats=1, peak=1000.0, devices=2, **small)
    assert figures["speedup_by_devices"] > 0
    assert figures["federation_overhead"] > 0
    assert 0 < figures["fraction_of_matrix_product"] < 1
    paces = [
        figures["fraction_of_matrix_product"] * figures["gflops_of_matrix_product"],
        figures["fraction_of_best_convolution"] * figures["gflops_of_best_convolution"],
        figures["fraction_of_given_peak"] * 1000.0,
    ]
    assert paces == pytest.approx([paces[0]] * 3)
    assert figures["temporary_mb_of_dispatch_on_2_devices"] > 0
    programs = {"step", "augmentation", "dispatch", "dispatch_on_2_devices"}
    assert set(figures["compile_seconds"]) == programs


def test_the_accelerator_benchmark_runs_in_short():
    row = gpu.steps(4, "float32", repeats=1, short=True)
    assert row["images_a_second"] == pytest.approx(4 / row["seconds_a_step"])
    rows = gpu.convolutions(4, "bfloat16", repeats=1, short=True)
    assert [row["channels"] for row in rows] == ["3 to 8", "64 to 8"]


def test_registered_clients_share_one_program():
    """Compiled for five clients, run with a thousand: no shape grows with stateless ones."""
    overrides = ("--config.width=4", "--config.blocks_per_stage=(1,)", "--config.head_width=8")
    few, many = (clients.setting(n, 5, *overrides) for n in (5, 1000))
    data = random_images(few)
    advance = clients.Loop(few, data).compile()
    assert clients.Loop(many, data).round(advance) > 0

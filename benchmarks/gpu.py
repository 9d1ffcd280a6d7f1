"""Step time on an accelerator: ResNet-18 in the paper's setting, in bfloat16 and float32.

    python -m benchmarks.gpu [--clients 100,1000] [--repeats 10] [--json FILE] [--short]

For each number of active clients (one image a step each): seconds a step inside a scanned dispatch,
images a second, and FLOP/s by the formula of benchmarks/step.py over the peak of a large matrix
product of the same type, measured in the same turns. And the convolution of per-client kernels,
forward and backward, `vmap` of JAX's own over the project's. --short shrinks everything, to try the
program on a CPU.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.step import SCAN_STEPS, Bench, Variant, medians, setting, step_flops
from mocosfl_jax.models.conv import conv

SHORT = {"width": 4, "blocks_per_stage": (1, 1), "head_width": 8, "queue_length": 64}
CHANNELS = (3, 64)
"""Inputs of the two 3x3 convolutions to 64 channels: those of the stem and of the first block."""


def matrix_product(size: int, dtype: str) -> Variant:
    """A product of two large matrices."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    compiled = jax.jit(lambda x: x @ x).lower(a).compile()
    return lambda: compiled(a)


def steps(clients: int, dtype: str, repeats: int, short: bool) -> dict[str, Any]:
    """Figures of one number of clients and one type."""
    fields: dict[str, Any] = {"queue_length": max(6000, 2 * clients), **(SHORT if short else {})}
    config = setting(
        num_clients=clients,
        cohort_size=clients,
        batch_size=1,
        total_batch=clients,
        compute_dtype=dtype,
        client_state="stateless",
        align_momentum=True,
        **fields,
    )
    bench, size = Bench(config), 256 if short else 8192
    seconds = medians({"dispatch": bench.dispatch(), "peak": matrix_product(size, dtype)}, repeats)
    a_step, peak = seconds["dispatch"] / SCAN_STEPS, 2 * size**3 / seconds["peak"]
    return {
        "clients": clients,
        "dtype": dtype,
        "seconds_a_step": a_step,
        "images_a_second": clients / a_step,
        "teraflops_a_second": step_flops(config) / a_step / 1e12,
        "peak_teraflops_a_second": peak / 1e12,
        "fraction_of_peak": step_flops(config) / a_step / peak,
        "compile_seconds": bench.compile_seconds["dispatch"],
    }


def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """JAX's convolution, which `vmap` over kernels makes a grouped one."""
    return lax.conv_general_dilated(
        x, kernel, (1, 1), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def convolutions(clients: int, dtype: str, repeats: int, short: bool) -> list[dict[str, Any]]:
    """Per-client kernels: seconds of `vmap` of the plain convolution over the project's."""
    rows = []
    for inputs in CHANNELS:
        size, outputs = (8, 8) if short else (32, 64)
        x = jnp.ones((clients, 1, size, size, inputs), dtype)
        kernel = jnp.ones((clients, 3, 3, inputs, outputs), dtype)

        def gradients(function: Any, x: jax.Array = x, kernel: jax.Array = kernel) -> Variant:
            def total(x: jax.Array, kernel: jax.Array) -> jax.Array:
                return jnp.sum(jax.vmap(function)(x, kernel).astype(jnp.float32) ** 2)

            compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(x, kernel).compile()
            return lambda: compiled(x, kernel)

        seconds = medians({"plain": gradients(plain), "project": gradients(conv)}, repeats)
        rows.append(
            {
                "channels": f"{inputs} to {outputs}",
                "clients": clients,
                "dtype": dtype,
                "plain_seconds": seconds["plain"],
                "project_seconds": seconds["project"],
                "plain_over_project": seconds["plain"] / seconds["project"],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", default="100,1000", help="active clients, comma-separated")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--short", action="store_true", help="tiny sizes, to try the program")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    results: dict[str, list[dict[str, Any]]] = {"steps": [], "convolutions": []}
    for dtype in args.dtypes.split(","):
        for clients in map(int, args.clients.split(",")):
            results["steps"].append(steps(clients, dtype, args.repeats, args.short))
            print(results["steps"][-1], flush=True)
        results["convolutions"] += convolutions(100, dtype, args.repeats, args.short)
        print(*results["convolutions"][-len(CHANNELS) :], sep="\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""How far apart clients are when they are averaged (MocoSFL, equation 4), by run.

    python -m mocosfl_jax.main ... --workdir runs/mocosfl_1 --config.measure.divergence=True
    python -m benchmarks.divergence --workdir runs/mocosfl_1 --workdir runs/fl_moco --plot FILE.png

MocoSFL measures it on request, local training always. Prints the first, the largest, the mean and
the last one of each run, and its parameters per client.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.hardness import check_plot, config_of
from mocosfl_jax.errors import InputError
from mocosfl_jax.run.console import answered
from mocosfl_jax.run.metrics import read_metrics
from mocosfl_jax.run.plan import client_parameters


def measured(workdir: Path) -> tuple[np.ndarray, np.ndarray]:
    """The steps of a run's averages and the divergence at each.

    Raises: InputError: it measured none.
    """
    lines = read_metrics(workdir / "metrics.jsonl")
    found = [(step, line["divergence"]) for step, line in lines.items() if "divergence" in line]
    if not found:
        allowed = "a run with config.measure.divergence, or of local training, is needed"
        raise InputError("--workdir", str(workdir), allowed)
    steps, values = zip(*found, strict=True)
    return np.array(steps), np.array(values)


def report(workdir: Path) -> dict[str, Any]:
    """Raises: InputError: see `measured`; or no run lies there."""
    config = config_of(workdir)
    _, values = measured(workdir)
    return {
        "run": str(workdir),
        "parameters": client_parameters(config),
        "averages": len(values),
        "first": float(values[0]),
        "largest": float(values.max()),
        "mean": float(values.mean()),
        "last": float(values[-1]),
    }


def plot(workdirs: list[Path], path: Path) -> None:
    """Divergence over steps, on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for workdir in workdirs:
        axes.semilogy(*measured(workdir), "o-", markersize=3, label=workdir.absolute().name)
    axes.set_xlabel("step")
    axes.set_ylabel("divergence at an average")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", action="append", type=Path, required=True, help="of a run")
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    args = parser.parse_args()
    sys.exit(answered("benchmarks.divergence", lambda: run(args)))


def run(args: argparse.Namespace) -> int:
    """Raises: InputError."""
    check_plot(args.plot)
    for row in [report(workdir) for workdir in args.workdir]:
        print(json.dumps(row))
    if args.plot:
        plot(args.workdir, args.plot)
    return 0


if __name__ == "__main__":
    main()

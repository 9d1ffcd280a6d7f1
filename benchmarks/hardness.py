"""Hardness of negatives by the age of their keys: what the paper's equation 2 makes of a run.

    python -m mocosfl_jax.main ... --workdir runs/shared --config.measure.hardness=True
    python -m benchmarks.hardness --workdir runs/shared --workdir runs/private --plot hardness.png

Takes the mean of the last measurements of each run, fits eta and gamma on the youngest third of the
ages, and prints what they predict for the sum over the others beside what was measured.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mocosfl_jax.config import Resolved
from mocosfl_jax.config.measure import Measure
from mocosfl_jax.errors import InputError
from mocosfl_jax.learning.hardness import Extrapolation, extrapolate
from mocosfl_jax.methods.mocosfl.build import keys_per_step, queue_steps
from mocosfl_jax.run.console import answered
from mocosfl_jax.run.metrics import read_metrics
from mocosfl_jax.run.workdir import read_stored

NEEDED = "a run with config.measure.hardness that has filled its queue is needed"


def config_of(workdir: Path) -> Resolved:
    """The config of a run. Raises: InputError: none lies there."""
    stored = read_stored(workdir)
    if stored is None or not isinstance(stored.config, Resolved):
        raise InputError("--workdir", str(workdir), "the folder of a run is needed")
    return stored.config


def measured(workdir: Path, last: int, until: int) -> tuple[Resolved, list[int], np.ndarray]:
    """A run's config, the steps of its last measurements up to a step, and their mean by age, (A,).

    Raises: InputError: no run lies there, or none that measured every age.
    """
    config = config_of(workdir)
    if not config.section_or_default(Measure).hardness:
        raise InputError("--workdir", str(workdir), NEEDED)
    names = [f"similarity_age_{age}" for age in range(1, queue_steps(config) + 1)]
    lines = read_metrics(workdir / "metrics.jsonl")
    complete = [line for line in lines.values() if all(name in line for name in names)]
    complete = [line for line in complete if line["step"] <= until][-last:]
    if not complete:
        raise InputError("--workdir", str(workdir), NEEDED)
    values = np.array([[line[name] for name in names] for line in complete])
    return config, [line["step"] for line in complete], values.mean(axis=0)


def report(
    workdir: Path, last: int, until: int
) -> tuple[dict[str, Any], np.ndarray, Extrapolation]:
    config, steps, similarity = measured(workdir, last, until)
    keys = keys_per_step(config)
    try:
        found = extrapolate(similarity, keys)
    except ValueError as error:
        raise InputError("--workdir", str(workdir), str(error)) from None
    row = {
        "run": str(workdir),
        "steps": [steps[0], steps[-1]],
        "measurements": len(steps),
        "keys_a_step": keys,
        "ages": len(similarity),
        "fitted": found.fitted,
        "eta": found.decay.eta,
        "gamma": found.decay.gamma,
        "predicted": found.predicted,
        "measured": found.measured,
        "predicted_over_measured": found.predicted / found.measured,
        "whole_hardness": float(keys * similarity.sum()),
        "similarity": [round(float(x), 5) for x in similarity],
    }
    return row, similarity, found


def plot(curves: dict[str, tuple[np.ndarray, Extrapolation]], path: Path) -> None:
    """Measured similarities as points, the fit as a line, dashed where it predicts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for index, (label, (similarity, found)) in enumerate(curves.items()):
        age, color = np.arange(1, len(similarity) + 1), f"C{index}"
        line = found.decay.similarity(age)
        axes.plot(age, similarity, "o", color=color, markersize=4, label=label)
        axes.plot(age[: found.fitted], line[: found.fitted], color=color)
        axes.plot(age[found.fitted - 1 :], line[found.fitted - 1 :], "--", color=color)
    axes.set_xlabel("age of the key, steps")
    axes.set_ylabel("mean similarity of query and key")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def check_plot(path: Path | None) -> None:
    """Raises: InputError: no picture can be written there."""
    if path is not None and not (path.suffix == ".png" and path.absolute().parent.is_dir()):
        raise InputError("--plot", str(path), "a .png file in an existing folder is needed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", action="append", type=Path, required=True, help="of a run")
    parser.add_argument("--last", type=int, default=20, help="measurements, the last ones")
    parser.add_argument("--until", type=int, default=sys.maxsize, help="step to which they go")
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    args = parser.parse_args()
    sys.exit(answered("benchmarks.hardness", lambda: run(args)))


def run(args: argparse.Namespace) -> int:
    """Raises: InputError."""
    check_plot(args.plot)
    if args.last < 1:
        raise InputError("--last", args.last, "at least 1 is needed")
    reports = [report(workdir, args.last, args.until) for workdir in args.workdir]
    curves = {}
    for workdir, (row, similarity, found) in zip(args.workdir, reports, strict=True):
        first, final = row["steps"]
        curves[f"{workdir.absolute().name}, steps {first} to {final}"] = similarity, found
        print(json.dumps(row))
    if args.plot:
        plot(curves, args.plot)
    return 0


if __name__ == "__main__":
    main()

"""What DIR/summary.json holds, and what a person sees of it."""

import math
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from mocosfl_jax.config import Config
from mocosfl_jax.data.dataset import Dataset
from mocosfl_jax.errors import InputError
from mocosfl_jax.federated.placement import Placement
from mocosfl_jax.machine import peak_memory_bytes, versions
from mocosfl_jax.run.checkpoint import Clock
from mocosfl_jax.run.plan import plan
from mocosfl_jax.run.storage import read_json

Summary = dict[str, Any]


def summarize(
    config: Config,
    run: str,
    clock: Clock,
    results: dict[str, float | None],
    dataset: Dataset,
    placement: Placement,
    gaps: list[list[int]],
) -> Summary:
    """Accuracies in percent, sizes in bytes.

    images_per_second counts images, without the padding of clients that have fewer than a batch;
    `padding_counted` is False for that, and is missing where version 0.1.0 counted padding too.

    Args: run: `Identity.digest`. gaps: first and last of the steps that metrics.jsonl lacks.
    """
    sizes = plan(config)
    pace = clock.trained_images / clock.train_seconds if clock.train_seconds else None
    return {
        **results,
        "run": run,
        "knn_top1_at_init": clock.knn_top1_at_init,
        "test_images": len(dataset.test.images) if dataset.test else 0,
        "steps": config.total_steps,
        "rounds": config.rounds,
        "images_per_second": pace,
        "padding_counted": clock.counts_padding,
        "compile_seconds": clock.compile_seconds,
        "wall_seconds": clock.wall_seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "metrics_missing_steps": gaps,
        "num_clients": config.num_clients,
        "cut": config.cut,
        "client_params": sizes.client_params,
        "server_params": sizes.server_params,
        "bytes_up_per_client_round": sizes.bytes_up_per_client_round,
        "bytes_down_per_client_round": sizes.bytes_down_per_client_round,
        "seed": config.seed,
        "device": jax.devices()[0].device_kind,
        "devices": placement.devices,
        "processes": jax.process_count(),
        "versions": versions(),
    }


def read_summary(path: Path) -> Summary:
    """Raises: InputError: a file that is no summary of a run."""
    summary = read_json(path)
    for name in ("steps", "wall_seconds", "test_images"):
        if not isinstance(summary.get(name), int | float):
            allowed = "the summary of a run is needed; move it away to have it made again"
            raise InputError(str(path), f"{name} {summary.get(name)!r}", allowed)
    for name in (*_ROWS, "images_per_second"):
        if not isinstance(summary.get(name), int | float | None):
            raise InputError(str(path), f"{name} {summary[name]!r}", "a number is needed")
    return summary


def standard_error(top1: float, images: int) -> float:
    """Of an accuracy, both in percent: that of a binomial proportion over so many test images."""
    share = top1 / 100
    return 100 * math.sqrt(share * (1 - share) / images)


_ROWS = {
    "knn_top1_raw_pixels": "kNN of raw pixels, at most 32x32",
    "knn_top1_at_init": "kNN of the untrained encoder",
    "knn_top1": "kNN",
    "linear_top1": "linear probe",
}


def results_table(summary: dict[str, Any]) -> str:
    """The end of a run in a few lines, the result last."""
    lines = [f"{summary['steps']} steps in {tqdm.format_interval(summary['wall_seconds'])}"]
    if summary.get("images_per_second"):
        lines[0] += f", {summary['images_per_second']:.0f} images/s"
    rows = {label: summary[name] for name, label in _ROWS.items() if summary.get(name) is not None}
    if rows:
        lines.append(f"top-1 % ± standard error, {summary['test_images']:,} test images:")
    width = max(map(len, _ROWS.values()))
    for label, top1 in rows.items():
        error = standard_error(top1, summary["test_images"])
        lines.append(f"  {label:<{width}}  {top1:6.2f} ± {error:.2f}")
    return "\n".join(lines)

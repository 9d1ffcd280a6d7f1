"""Trains every baseline briefly, to see that it learns: a small network on the procedural set.

    python -m mocosfl_jax.sweep --config configs/sweeps/baselines.py --workdir runs/baselines

Five clients of two classes, as in configs/baselines, but with batches of 20 and eight rounds of 50
steps. `ema` is 0.9, not the published 0.99, because there are few steps.
"""

from ml_collections import ConfigDict

from mocosfl_jax.sweep.definition import default_sweep

NARROW = {"head_width": 128}
FASTER = {**NARROW, "ema": 0.9}
BASELINES = {
    "fedavg": {},  # a score a class
    "fl_simclr": NARROW,
    "fl_simsiam": NARROW,
    "fl_moco": {**FASTER, "queue_length": 400},
    "fl_byol": FASTER,
    "fedu": FASTER,
    "fedema": FASTER,
}


def get_config() -> ConfigDict:
    sweep = default_sweep("local")
    sweep.variants = {
        name: {"base": f"configs/baselines/{name}.py", **fields}
        for name, fields in BASELINES.items()
    }
    sweep.fixed.dataset = "synthetic"
    sweep.fixed.width = 16
    sweep.fixed.blocks_per_stage = (1, 1, 1)
    sweep.fixed.stem = "3x3s2"
    sweep.fixed.crop_min_scale = 0.3
    sweep.fixed.batch_size = 20
    sweep.fixed.steps_per_round = 50
    sweep.fixed.rounds = 8
    sweep.fixed.learning_rate = 0.06
    sweep.fixed.probe_epochs = 0
    sweep.fixed.knn_every = 8
    sweep.columns = "metrics"
    sweep.metrics = ("knn_top1_at_init", "knn_top1", "wall_seconds")
    return sweep

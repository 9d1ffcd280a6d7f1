"""One method of the comparison on CIFAR-10, with the narrow network of cifar10_cpu.py.

    python -m mocosfl_jax.main --config configs/comparison.py:FL-MoCo --workdir runs/fl_moco

By name, as in `METHODS` below. Each sees 100,000 images, 10,000 a round, of 20 clients with 2
classes each, 5 of them a round; 20 images a client and step. The last 5,000 training images are
held out, to choose learning rates by them: what a run calls its test images are these.
"""

from typing import Any

from ml_collections import ConfigDict

from mocosfl_jax.config import default_config
from mocosfl_jax.errors import InputError

NORMALISED = {"head": "largeV2", "head_width": 128}
"""Head, and predictor if there is one, with BatchNorm; twice as wide inside."""

CENTRALISED = {
    "num_clients": 1,
    "cohort_size": 1,
    "classes_per_client": None,
    "batch_size": 100,
    "loss": "client",
    "queue_length": 2000,
}
"""One client has all images, and both of its views pass through both encoders."""

METHODS: dict[str, dict[str, Any]] = {
    "MocoSFL-1": {"cut": 1, "queue_length": 2000},
    "MocoSFL-3 aligned": {"cut": 2, "align_momentum": True, "queue_length": 2000},
    "MocoSFL-3 aligned, BatchNorm": {
        "cut": 2,
        "align_momentum": True,
        "queue_length": 2000,
        **NORMALISED,
    },
    "FL-MoCo": {"local": {"objective": "moco"}, "queue_length": 2000},
    # As in configs/baselines/fl_moco.py.
    "FL-MoCo, BatchNorm": {"local": {"objective": "moco"}, "queue_length": 2000, **NORMALISED},
    "FL-SimCLR": {"local": {"objective": "simclr"}},
    "FL-SimSiam": {"local": {"objective": "simsiam"}, **NORMALISED},
    "FL-BYOL": {"local": {"objective": "byol"}, **NORMALISED},
    # A round is then 56,000 images.
    "FL-BYOL, 5 local epochs": {
        "local": {"objective": "byol"},
        **NORMALISED,
        "local_epochs": 5,
        "steps_per_round": None,
        "rounds": 2,
    },
    "FedU": {"local": {"objective": "byol", "merge": "fedu"}, **NORMALISED},
    "FedEMA": {"local": {"objective": "byol", "merge": "fedema"}, **NORMALISED},
    # With labels; the embedding holds one score a class.
    "FedAvg": {"local": {"objective": "supervised"}, "head": "V1", "head_width": 10},
    "centralised MoCo": CENTRALISED,
    "centralised MoCo, BatchNorm": {**CENTRALISED, **NORMALISED},
}


def get_config(method: str = "") -> ConfigDict:
    if method not in METHODS:
        raise InputError("method", method, f"one of {', '.join(map(repr, METHODS))} is needed")
    fields = METHODS[method]
    config = default_config("local" if "local" in fields else "mocosfl")
    config.dataset = "cifar10"
    config.train_split = "train[:45000]"
    config.test_split = "train[45000:]"
    config.num_clients = 20
    config.cohort_size = 5
    config.classes_per_client = 2
    if config.method == "local":
        config.batch_size = 20
    config.steps_per_round = 100
    config.rounds = 10
    config.width = 32
    config.blocks_per_stage = (1, 1, 1)
    config.stem = "3x3s2"
    config.head_width = 128
    config.schedule = "cosine"
    config.augmentation = "v1"
    config.crop_min_scale = 0.2
    config.knn_every = 0
    config.probe_epochs = 0
    config.update(fields)
    return config

"""A first run in a few minutes on two CPU cores, on procedural images: nothing is downloaded.

    python -m mocosfl_jax.main --config configs/quickstart.py --workdir runs/quickstart

20 clients with 2 of the 10 classes each; a narrow, shallow network.
"""

from ml_collections import ConfigDict

from mocosfl_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.dataset = "synthetic"
    config.num_clients = 20
    config.classes_per_client = 2
    config.epochs = 6
    config.width = 32
    config.blocks_per_stage = (1, 1, 1)
    config.stem = "3x3s2"
    config.head_width = 128
    config.queue_length = 1000
    config.augmentation = "v1"
    config.crop_min_scale = 0.3
    config.knn_every = 2
    config.probe_epochs = 20
    return config

"""CIFAR-10 with a narrow network, for two CPU cores: 20 clients of 2 classes, 5 images each a step.

    python -m mocosfl_jax.main --config configs/cifar10_cpu.py --workdir runs/cifar10_cpu

A network of one block a stage, 32 to 256 channels, whose stem halves the image; a head and a queue
of 128 columns. docs/results/cifar10_cpu.md says how long it takes and what comes out.
"""

from ml_collections import ConfigDict

from mocosfl_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.dataset = "cifar10"
    config.num_clients = 20
    config.classes_per_client = 2
    config.epochs = 4
    config.width = 32
    config.blocks_per_stage = (1, 1, 1, 1)
    config.stem = "3x3s2"
    config.head_width = 128
    config.knn_every = 1
    return config

"""CIFAR-10 with a narrow network, for two CPU cores: 20 clients of 2 classes, 5 images each a step.

    python -m mocosfl_jax.main --config configs/cifar10_cpu.py --workdir runs/cifar10_cpu

A network of three stages of one block, 32 to 128 channels, whose stem halves the image (a fourth
stage would normalise maps of 2x2 pixels, and lose most of what they say); a head of 128 columns and
a queue of 2,000 keys. Views are milder than the paper's (no blur, crops of at least 20 %). With
four stages, the paper's views and 6,000 keys gave kNN 29.5 % after 2,000 steps; these views and
2,000 keys 43.0 % after 1,000 (what each of the two changes did was not separated).
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
    config.blocks_per_stage = (1, 1, 1)
    config.stem = "3x3s2"
    config.head_width = 128
    config.queue_length = 2000
    config.augmentation = "v1"
    config.crop_min_scale = 0.2
    config.knn_every = 1
    return config

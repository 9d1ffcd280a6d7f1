"""Tiny-ImageNet: 200 classes at 64 pixels, from a folder.

    python -m mocosfl_jax.main --config configs/tiny_imagenet.py --workdir runs/tiny_imagenet \
        --config.dataset=folder:/data/tiny-imagenet-200 --config.num_clients=100

The folder holds train/<class>/... and val/<class>/... (the archive's val images moved into a folder
a class). The stem is 3x3 with stride 2 by the rule for this size.
"""

from ml_collections import ConfigDict

from mocosfl_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.dataset = "folder:data/tiny-imagenet-200"
    config.image_size = 64
    return config

"""Pictures of one's own, with classes or without: a narrow network at 64 pixels, 10 IID clients.

    python -m mocosfl_jax.main --config configs/folder.py --workdir runs/mine \
        --config.dataset=folder:/data/pictures

The folder holds one folder a class, or just pictures. Without classes there is no accuracy to
report, and no test set is held out. Any number of pictures will do: 50 passes suit some thousands;
a few hundred need more, and a hundred thousand fewer (--config.epochs=5).
"""

from ml_collections import ConfigDict

from mocosfl_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.dataset = "folder:data/pictures"
    config.image_size = 64
    config.num_clients = 10
    config.epochs = 50
    config.width = 32
    config.blocks_per_stage = (1, 1, 1)
    config.head_width = 128
    config.queue_length = 1000
    config.augmentation = "v1"
    config.crop_min_scale = 0.3
    config.probe_epochs = 20
    return config

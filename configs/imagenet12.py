"""The paper's setting on ImageNet-12: 12 classes of ImageNet at 224 pixels, from a folder.

    python -m mocosfl_jax.main --config configs/imagenet12.py --workdir runs/imagenet12 \
        --config.dataset=folder:/data/imagenet12 --config.num_clients=100 \
        --config.classes_per_client=2

The folder holds train/<class>/*.JPEG and val/<class>/*.JPEG. The stem is 7x7 with stride 2 by the
rule for this size. Published linear accuracy, MocoSFL-1, 100 clients, non-IID: 92.24 %.
"""

from ml_collections import ConfigDict

from mocosfl_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.dataset = "folder:data/imagenet12"
    config.image_size = 224
    return config

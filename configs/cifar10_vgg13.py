"""VGG-13 on CIFAR-10 with the rates of the public code's scripts: 100 clients, cut 2.

    python -m mocosfl_jax.main --config configs/cifar10_vgg13.py --workdir runs/vgg13

The rate is that for IID clients; with 2 classes a client it is 0.02:
`--config.classes_per_client=2 --config.learning_rate=0.02`. No published accuracy is at hand.
"""

from ml_collections import ConfigDict

from mocosfl_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.dataset = "cifar10"
    config.num_clients = 100
    config.backbone = "vgg13"
    config.cut = 2
    config.learning_rate = 0.03
    return config

"""MobileNetV2 on CIFAR-10 with the rate of the public code's scripts: 100 clients, cut 2.

    python -m mocosfl_jax.main --config configs/cifar10_mobilenetv2.py --workdir runs/mobilenetv2

The rate is the same for IID clients and for those of 2 classes (`--config.classes_per_client=2`).
No published accuracy is at hand.
"""

from ml_collections import ConfigDict

from mocosfl_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.dataset = "cifar10"
    config.num_clients = 100
    config.backbone = "mobilenetv2"
    config.cut = 2
    config.learning_rate = 0.03
    return config

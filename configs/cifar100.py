"""The paper's setting on CIFAR-100: as configs/cifar10.py; its non-IID clients hold 20 classes.

    python -m mocosfl_jax.main --config configs/cifar100.py --workdir runs/cifar100 \
        --config.num_clients=1000 --config.classes_per_client=20

Published linear accuracy, MocoSFL-1, 1,000 clients, non-IID: 56.75 %.
"""

from ml_collections import ConfigDict

from mocosfl_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.dataset = "cifar100"
    return config

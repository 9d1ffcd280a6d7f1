"""The paper's setting on CIFAR-10: ResNet-18, 200 epochs, total batch 100, queue of 6,000 keys.

    python -m mocosfl_jax.main --config configs/cifar10.py --workdir runs/cifar10 \
        --config.num_clients=1000 --config.classes_per_client=2 --config.cut=1

Cohort, batch size, rounds and syncs follow from the number of clients by the paper's rule.
Published linear accuracy, MocoSFL-1, 1,000 clients with 2 classes each: 86.46 %. The commands of
all cells of the paper's tables are in docs/settings.md.
"""

from ml_collections import ConfigDict

from mocosfl_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.dataset = "cifar10"
    return config

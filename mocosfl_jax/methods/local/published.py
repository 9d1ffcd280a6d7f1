"""The published setting of federated self-supervised learning, for `configs/baselines`."""

from ml_collections import ConfigDict

from mocosfl_jax.config import default_config


def published(objective: str, merge: str = "average") -> ConfigDict:
    """The setting of Zhuang et al. 2022 (ICLR) and its public code, on CIFAR-10.

    Five clients of 2 classes, all active; 100 rounds of 5 local epochs. The other setting has 20
    clients of which 5 are drawn a round.

    Args: objective, merge: `config.local`.
    """
    config = default_config("local")
    config.local.objective = objective
    config.local.merge = merge
    config.dataset = "cifar10"
    config.num_clients = 5
    config.classes_per_client = 2
    config.sync_weights = "size"
    config.rounds = 100
    config.local_epochs = 5
    config.batch_size = 128
    config.learning_rate = 0.032
    config.schedule = "cosine"
    config.augmentation = "v1"
    config.head = "largeV2"
    return config

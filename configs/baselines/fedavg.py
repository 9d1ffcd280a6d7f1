"""FedAvg (McMahan et al. 2017) on labels: what federated training reaches that is told the classes.

    python -m mocosfl_jax.main --config configs/baselines/fedavg.py --workdir runs/fedavg

The head is one linear layer with a score for each of the ten classes. No published number at hand.
With 20 clients: --config.num_clients=20 --config.cohort_size=5.
"""

from ml_collections import ConfigDict

from mocosfl_jax.methods.local.published import published


def get_config() -> ConfigDict:
    config = published("supervised")
    config.head = "V1"
    config.head_width = 10
    return config

"""FL-BYOL: BYOL with a target network of its own for each client, averaged once a round.

    python -m mocosfl_jax.main --config configs/baselines/fl_byol.py --workdir runs/fl_byol

Published linear accuracy (table of the MocoSFL paper): CIFAR-10, 20 clients 75.77 %; CIFAR-100, 5
clients 61.78 %, 20 clients 52.78 %. Its 83.34 % for 5 clients on CIFAR-10 is FedEMA's number.
With 20 clients: --config.num_clients=20 --config.cohort_size=5.
"""

from ml_collections import ConfigDict

from mocosfl_jax.methods.local.published import published


def get_config() -> ConfigDict:
    return published("byol")

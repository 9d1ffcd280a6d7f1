"""FedEMA (Zhuang et al. 2022): FL-BYOL whose clients start from a mean of own model and average.

    python -m mocosfl_jax.main --config configs/baselines/fedema.py --workdir runs/fedema

Published linear accuracy, CIFAR-10, 5 clients of 2 classes: 83.34 %; users of its code report 82.1.
With 20 clients: --config.num_clients=20 --config.cohort_size=5.
"""

from ml_collections import ConfigDict

from mocosfl_jax.methods.local.published import published


def get_config() -> ConfigDict:
    return published("byol", "fedema")

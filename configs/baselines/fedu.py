"""FedU (Zhuang et al. 2021): FL-BYOL, but a client that moved far goes on with its own predictor.

    python -m mocosfl_jax.main --config configs/baselines/fedu.py --workdir runs/fedu

No published number at hand. With 20 clients: --config.num_clients=20 --config.cohort_size=5.
"""

from ml_collections import ConfigDict

from mocosfl_jax.methods.local.published import published


def get_config() -> ConfigDict:
    return published("byol", "fedu")

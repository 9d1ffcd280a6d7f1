"""FL-MoCo: MoCo with a queue of 6,000 keys of its own for each client, averaged once a round.

    python -m mocosfl_jax.main --config configs/baselines/fl_moco.py --workdir runs/fl_moco

No published number at hand. With 20 clients: --config.num_clients=20 --config.cohort_size=5.
"""

from ml_collections import ConfigDict

from mocosfl_jax.methods.local.published import published


def get_config() -> ConfigDict:
    return published("moco")

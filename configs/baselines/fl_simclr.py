"""FL-SimCLR: NT-Xent with the negatives of a batch (Chen et al. 2020), averaged once a round.

    python -m mocosfl_jax.main --config configs/baselines/fl_simclr.py --workdir runs/fl_simclr

No published number at hand. With 20 clients: --config.num_clients=20 --config.cohort_size=5.
"""

from ml_collections import ConfigDict

from mocosfl_jax.methods.local.published import published


def get_config() -> ConfigDict:
    return published("simclr")

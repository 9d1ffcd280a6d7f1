"""FL-SimSiam: a predictor and no target network (Chen & He 2021), averaged once a round.

    python -m mocosfl_jax.main --config configs/baselines/fl_simsiam.py --workdir runs/fl_simsiam

No published number at hand. With 20 clients: --config.num_clients=20 --config.cohort_size=5.
"""

from ml_collections import ConfigDict

from mocosfl_jax.methods.local.published import published


def get_config() -> ConfigDict:
    return published("simsiam")

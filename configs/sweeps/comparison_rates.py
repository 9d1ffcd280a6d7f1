"""Three learning rates for each method of configs/comparison.py, with 20 clients.

    python -m mocosfl_jax.sweep --config configs/sweeps/comparison_rates.py \
        --workdir runs/comparison_rates

Rates are chosen by kNN on the training images that are held out. The numbers called `test` are
those on the test images of CIFAR-10.
"""

from ml_collections import ConfigDict

from mocosfl_jax.sweep.definition import default_sweep

METHODS = (
    "MocoSFL-1",
    "MocoSFL-3 aligned",
    "MocoSFL-3 aligned, BatchNorm",
    "FL-MoCo",
    "FL-MoCo, BatchNorm",
    "FL-BYOL",
    "FL-BYOL, 5 local epochs",
    "FedEMA",
    "FedAvg",
    "centralised MoCo",
    "centralised MoCo, BatchNorm",
)
ON_TEST = "mocosfl_jax.evaluate --dataset=cifar10 --train_split=train[:45000] --name=test"


def get_config() -> ConfigDict:
    sweep = default_sweep()
    sweep.variants = {name: {"base": f"configs/comparison.py:{name}"} for name in METHODS}
    sweep.grid.learning_rate = (0.02, 0.06, 0.18)
    sweep.commands = (ON_TEST,)
    sweep.columns = "learning_rate"
    sweep.metrics = (
        "knn_top1",
        "transfer/test/linear_top1",
        "transfer/test/knn_top1",
        "transfer/test/semi_10_top1",
        "bytes_up_per_client_round",
        "bytes_down_per_client_round",
    )
    return sweep

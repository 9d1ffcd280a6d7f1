"""MocoSFL beside federated learning with whole models, over the number of clients.

    python -m mocosfl_jax.sweep --config configs/sweeps/comparison.py --workdir runs/comparison

Each method has one learning rate, which comparison_rates.py found best with 20 clients by kNN on
the training images that are held out. Of 5 and of 100 clients all take part in each round, of 20
clients 5 do. A round is 10,000 images throughout. The numbers called `test` are those on the test
images of CIFAR-10.
"""

from ml_collections import ConfigDict

from mocosfl_jax.sweep.definition import default_sweep

ON_TEST = "mocosfl_jax.evaluate --dataset=cifar10 --train_split=train[:45000] --name=test"
RATES = {
    "MocoSFL-3 aligned": 0.02,
    "MocoSFL-3 aligned, BatchNorm": 0.02,
    "FL-MoCo": 0.02,
    "FL-MoCo, BatchNorm": 0.02,
    "FL-BYOL": 0.02,
    "FedEMA": 0.06,
}
WHOLE_MODELS = ("FL-MoCo", "FL-MoCo, BatchNorm", "FL-BYOL", "FedEMA")


def get_config() -> ConfigDict:
    sweep = default_sweep()
    sweep.variants = {
        name: {"base": f"configs/comparison.py:{name}", "learning_rate": rate}
        for name, rate in RATES.items()
    }
    sweep.grid.num_clients = (5, 20, 100)
    sweep.more_fields = (
        {"num_clients": (100,), "fields": {"cohort_size": 100}},
        # 20 images a client and step, so 2,000 a step.
        {"num_clients": (100,), "variant": WHOLE_MODELS, "fields": {"steps_per_round": 5}},
    )
    repeated = tuple(name for name in RATES if name != "FL-MoCo")
    sweep.more_seeds = ({"num_clients": (20,), "variant": repeated, "seeds": (1, 2)},)
    sweep.commands = (ON_TEST,)
    sweep.metrics = (
        "transfer/test/knn_top1",
        "transfer/test/linear_top1",
        "transfer/test/semi_10_top1",
        "bytes_up_per_client_round",
        "bytes_down_per_client_round",
    )
    return sweep

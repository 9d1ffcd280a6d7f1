"""Accuracy over the number of clients: CIFAR-10 on two CPU cores, one epoch of 500 steps each.

    python -m mocosfl_jax.sweep --config configs/sweeps/client_count.py --workdir runs/client_count

Total batch and sampling follow the paper's rule: up to 100 clients take part in each round, with
100 images a step together. So all runs take the same number of steps on the same number of images.
The ends of the range have a second seed, to tell the effect of clients from that of chance.
"""

from ml_collections import ConfigDict

from mocosfl_jax.sweep.definition import default_sweep


def get_config() -> ConfigDict:
    sweep = default_sweep()
    sweep.base = "configs/cifar10_cpu.py"
    sweep.fixed.epochs = 1
    sweep.grid.num_clients = (10, 50, 100, 500, 1000)
    sweep.seeds = (0,)
    sweep.more_seeds = ({"num_clients": (10, 1000), "seeds": (1,)},)
    return sweep

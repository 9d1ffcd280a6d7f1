"""TAResSFL, before deployment: the server pre-trains the whole network against an attacker.

    python -m mocosfl_jax.main --config configs/taressfl_pretrain.py \
        --workdir runs/taressfl_pretrain

One client is trained with ResSFL on images of another domain, CIFAR-100, and on 1 % of the target's
training images, CIFAR-10: 128 rows of each a step. All are normalised as CIFAR-10 is, as the
clients will later. 0.5 % of the target: --config.mix_fraction=0.005; nothing of it:
--config.mix_dataset=None --config.mix_fraction=1. Accuracies are those on CIFAR-100.
configs/taressfl.py goes on from here.

Of the 19 runs of this kind that the paper's authors published 5 collapse. Here the term against the
attacker is left out of the first 30 % of the training; none of the small runs that did so collapsed
(docs/results/collapse.md). A run whose loss is at chance for a whole round is stopped.
"""

from ml_collections import ConfigDict

from mocosfl_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.dataset = "cifar100"
    config.mix_dataset = "cifar10"
    config.mix_fraction = 0.01
    config.image_size = 32
    config.mean = (0.4914, 0.4822, 0.4465)
    config.std = (0.2470, 0.2435, 0.2616)
    config.num_clients = 1
    config.batch_size = 128
    config.syncs_per_round = 1
    config.cut = 2
    config.bottleneck = "C4S2"
    config.ressfl.alpha = 2.0
    config.ressfl.threshold = 0.6
    config.ressfl.warmup = 0.3
    return config

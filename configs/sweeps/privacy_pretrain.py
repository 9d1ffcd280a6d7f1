"""Pre-trained networks for the TAResSFL rows of privacy.py, with 0, 0.5 and 1 % of CIFAR-10.

    python -m mocosfl_jax.sweep --config configs/sweeps/privacy_pretrain.py \
        --workdir runs/privacy_pretrain

ResSFL, after a warm-up, on CIFAR-100 and on 0, 250 or 500 training images of the target, with the
narrow network of configs/cifar10_cpu.py: 1,000 steps of 100 images, half of them the target's where
it has any. Images of your own in place of CIFAR-100: --config.fixed.dataset=folder:PATH. Accuracies
are those on that data set.
"""

from ml_collections import ConfigDict

from mocosfl_jax.sweep.definition import default_sweep


def get_config() -> ConfigDict:
    sweep = default_sweep()
    sweep.base = "configs/taressfl_pretrain.py"
    sweep.fixed.width = 32
    sweep.fixed.blocks_per_stage = (1, 1, 1)
    sweep.fixed.stem = "3x3s2"
    sweep.fixed.head_width = 128
    sweep.fixed.queue_length = 2000
    sweep.fixed.augmentation = "v1"
    sweep.fixed.crop_min_scale = 0.2
    sweep.fixed.steps_per_round = 250
    sweep.fixed.rounds = 4
    sweep.variants = {
        "TAResSFL 0": {"mix_dataset": None, "mix_fraction": 1.0, "batch_size": 100},
        "TAResSFL 250": {"mix_fraction": 0.005, "batch_size": 50},
        "TAResSFL 500": {"mix_fraction": 0.01, "batch_size": 50},
    }
    sweep.columns = "metrics"
    return sweep

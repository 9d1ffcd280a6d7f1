"""Whether pre-training against an attacker collapses, with and without a warm-up of the term.

    python -m mocosfl_jax.sweep --config configs/sweeps/collapse.py --workdir runs/collapse

configs/taressfl_pretrain.py with a small network, a small decoder and images of 16 pixels: 1,000
steps of 64 rows, two or three minutes each on a CPU core. The rows are of Fashion-MNIST, or half of
them are of 60 training images of CIFAR-10, and the queue then holds 8 keys of each. The threshold
is lower than for the paper's decoder, which sees more. kNN is on Fashion-MNIST; a run that is at
chance for a whole round is stopped and has none.
"""

from ml_collections import ConfigDict

from mocosfl_jax.sweep.definition import default_sweep

TERMS = {
    "no term": {"alpha": 0.0, "warmup": 0.0},
    "term": {"warmup": 0.0},
    "term after warm-up": {"warmup": 0.3},
}


def get_config() -> ConfigDict:
    sweep = default_sweep()
    sweep.base = "configs/taressfl_pretrain.py"
    sweep.fixed.dataset = "fashion_mnist"
    sweep.fixed.train_split = "train[:10000]"
    sweep.fixed.test_split = "test[:1000]"
    sweep.fixed.image_size = 16
    sweep.fixed.width = 16
    sweep.fixed.blocks_per_stage = (1, 1, 1)
    sweep.fixed.stem = "3x3s2"
    sweep.fixed.head_width = 64
    sweep.fixed.queue_length = 1000
    sweep.fixed.augmentation = "v1"
    sweep.fixed.crop_min_scale = 0.2
    sweep.fixed.steps_per_round = 250
    sweep.fixed.rounds = 4
    sweep.fixed.probe_epochs = 0
    sweep.fixed.knn_every = 0
    sweep.fixed.devices = 1
    sweep.variants = {
        **{name: _variant(term, images=0) for name, term in TERMS.items()},
        **{f"{name}, 60 target images": _variant(term, 60) for name, term in TERMS.items()},
    }
    sweep.seeds = (0, 1, 2)
    sweep.more_seeds = ({"variant": ("term",), "seeds": (3, 4, 5)},)
    sweep.columns = "seed"
    sweep.metrics = ("knn_top1",)
    return sweep


def _variant(term: dict, images: int) -> dict:
    attacker = {"decoder": "res_normN1C16", "threshold": 0.45, **term}
    if not images:
        return {"mix_dataset": None, "mix_fraction": 1.0, "batch_size": 64, "ressfl": attacker}
    return {"mix_fraction": images / 50_000, "batch_size": 32, "ressfl": attacker}

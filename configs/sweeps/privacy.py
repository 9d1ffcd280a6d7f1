"""What privacy costs: accuracy over leakage of each defence, CIFAR-10 on two CPU cores.

    python -m mocosfl_jax.sweep --config configs/sweeps/privacy_pretrain.py \
        --workdir runs/privacy_pretrain
    python -m mocosfl_jax.sweep --config configs/sweeps/privacy.py --workdir runs/privacy

Each run trains 20 clients for 1,000 steps and is then attacked. TAResSFL starts from the runs of
the first command, in that very folder, which have seen 0, 250 or 500 training images of CIFAR-10.

Rows have cut 1 unless their name says otherwise; TAResSFL has cut 2. At cut 1 an untrained
client's latents of an image (16x16x32) have a median L2 norm of 64, and nine in ten are within 5 %
of it. So `clip.norm` is 64 where there is noise, whose deviation of 0.2, 0.6 or 1.9 is to be seen
beside the 0.7 that latents have as their root mean square. With the bottleneck C4S2 (8x8x4) the
median is 8 or 12, by seed.
"""

from ml_collections import ConfigDict

from mocosfl_jax.sweep.definition import default_sweep

BOTTLENECK = {"bottleneck": "C4S2"}
FROZEN = {
    **BOTTLENECK,
    "cut": 2,
    "client_learning_rate": 0.0,
    "learning_rate": 0.001,
    "client_state": "stateless",
    "align_momentum": True,
}
NOISE = {"weak noise": 0.003, "medium noise": 0.01, "strong noise": 0.03}
TARGET_IMAGES = (0, 250, 500)


def get_config() -> ConfigDict:
    sweep = default_sweep()
    sweep.base = "configs/cifar10_cpu.py"
    sweep.fixed.epochs = 2
    sweep.variants = {
        "no defence cut 1": {},
        "no defence cut 2": {"cut": 2},
        "no defence cut 3 aligned": {"cut": 3, "align_momentum": True},
        "C4S2": BOTTLENECK,
        **{name: _noise(multiplier) for name, multiplier in NOISE.items()},
        "NoPeek": {"nopeek": {"weight": 1.0}},
        "8 bits": {"quantize": {"bits": 8}},
        **{f"TAResSFL {images}": _taressfl(images) for images in TARGET_IMAGES},
    }
    sweep.commands = ("mocosfl_jax.attack --decoder=res_normN4C64 --name=N4C64",)
    twice = ("no defence cut 1", "C4S2", *(f"TAResSFL {images}" for images in TARGET_IMAGES))
    deeper = "mocosfl_jax.attack --decoder=res_normN8C64 --name=N8C64"
    sweep.more_commands = ({"variant": twice, "commands": (deeper,)},)
    sweep.columns = "metrics"
    sweep.metrics = (
        "linear_top1",
        "linear_top1_released",
        "knn_top1",
        "knn_top1_released",
        "attack/N4C64/mse_ratio",
        "attack/N4C64/ssim.mean",
        "attack/N4C64/psnr.mean",
        "attack/N8C64/mse_ratio",
        "epsilon",
        "bytes_up_per_client_round",
        "bytes_down_per_client_round",
    )
    sweep.scatter = ("attack/N4C64/mse_ratio", "linear_top1")
    return sweep


def _noise(multiplier: float) -> dict:
    return {"clip": {"norm": 64.0}, "noise": {"multiplier": multiplier}}


def _taressfl(images: int) -> dict:
    return {**FROZEN, "init_from": f"runs/privacy_pretrain/runs/TAResSFL_{images},seed=0"}

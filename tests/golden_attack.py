"""Replays the authors' attacks on client models that they trained with ResSFL; takes minutes.

CIFAR-10 comes from a prepared TFDS data set, and `targets.npz` lies beside the files.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mocosfl_jax.attack.inversion import (
    PARTS,
    Attack,
    Epoch,
    evaluate,
    suitable_devices,
    train_decoder,
)
from mocosfl_jax.attack.options import Options
from mocosfl_jax.attack.quality import Quality, quality_of_one
from mocosfl_jax.data.sources import load_dataset
from mocosfl_jax.models.client_net import ClientNet
from mocosfl_jax.models.decoder import Decoder
from mocosfl_jax.randomness import Stream, host_rng
from mocosfl_jax.run.virtual import use_virtual_devices
from tests.golden_errors import Errors, Golden
from tests.golden_model import IMAGE_SIZE, golden_model

AUXILIARY = 500  # images of the train split, a tenth of them to validate
BOUND = 0.2


def client_params(net: ClientNet, golden: Golden) -> Any:
    """The authors' parameters in the places of ours."""
    images = jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3))
    shapes = jax.eval_shape(net.init, jax.random.key(0), images)["params"]

    def named(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
        name = "/".join(key.key for key in path).replace("bottleneck/", "bottleneck/client/")
        assert golden[name].shape == x.shape, name
        return jnp.asarray(golden[name])

    return jax.tree_util.tree_map_with_path(named, shapes)


def auxiliary_images(seed: int) -> np.ndarray:
    options = dict(data_dir=None, train_split=None, test_split=None, image_size=IMAGE_SIZE)
    images = load_dataset("cifar10", holdout_fraction=None, seed=0, **options).train.images
    return images[host_rng(seed, Stream.ATTACK, 0).permutation(len(images))[:AUXILIARY]]


def replay_attack(config: dict[str, Any], golden: Golden) -> Errors:
    use_virtual_devices(PARTS)
    net = golden_model({"head_width": 128, **config}).client
    options, params = Options(), client_params(net, golden)
    attack = Attack(
        send=lambda params, images, key: net.apply({"params": params}, images),
        decoder=Decoder(options.decoder_shape, IMAGE_SIZE),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        devices=suitable_devices(),
    )
    images = auxiliary_images(options.seed)
    validate, train = np.split(images, [AUXILIARY // 10])
    trained = train_decoder(attack, params, train, validate, say)
    targets = np.load(config["path"].parent / "targets.npz")["images"]
    mean_image = (images.mean(axis=0, dtype=np.float64) / 255).astype(np.float32)
    print("  mean image:", shown(quality_of_one(mean_image, targets)))
    found = evaluate(attack, trained.variables, params, targets)
    theirs = {name: np.mean(config[name]) for name in ("mse", "ssim", "psnr")}
    spread = ", ".join(f"{name} {config[name]}" for name in theirs)
    print(f"  ours: {shown(found)}; theirs: {spread}", flush=True)
    unlike, theirs_unlike = 1 - found.ssim.mean(), 1 - theirs["ssim"]
    return {
        "mse": abs(found.mse.mean() / theirs["mse"] - 1) / BOUND,
        "1 - ssim": abs(unlike / theirs_unlike - 1) / BOUND,
    }


def shown(found: Quality) -> str:
    means = {name: values.mean() for name, values in found._asdict().items()}
    return "mse {mse:.4f} ssim {ssim:.4f} psnr {psnr:.2f}".format(**means)


def say(epoch: Epoch) -> None:
    if epoch.number % 10 == 0:
        errors = f"error {epoch.train_mse:.4f}, validation {epoch.validation_mse:.4f}"
        print(f"  epoch {epoch.number}: {errors}", flush=True)

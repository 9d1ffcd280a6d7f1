"""Seconds of a model inversion attack beside the same attack in PyTorch.

    pip install torch
    python -m benchmarks.attack [--epochs 50] [--repeats 3] [--cut 1] [--decoder res_normN4C64]

The client is a ResNet-18's up to the cut and the bottleneck C4S2, random and frozen; the decoder
learns from 450 random images in batches of 32 and is validated on 50 after each epoch, as
`mocosfl_jax.attack` does it, on a CPU with two virtual devices. Both sides make the latents anew in
each step. They take turns, `repeats` times; medians are reported, of all epochs with compilation,
and of one epoch without.
"""

import argparse
import importlib
import json
import platform
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mocosfl_jax.attack.inversion import PARTS, Attack, Epoch, suitable_devices, train_decoder
from mocosfl_jax.config import check_types, default_config, resolve
from mocosfl_jax.config.network import model_of
from mocosfl_jax.data.dataset import DatasetInfo
from mocosfl_jax.models.decoder import Decoder, DecoderShape, doublings, parse_decoder
from mocosfl_jax.models.split import SplitModel
from mocosfl_jax.run.virtual import use_virtual_devices

SIZE, TRAIN, VALIDATE, BATCH = 32, 450, 50, 32
CIFAR10 = DatasetInfo(
    name="cifar10", num_train=50_000, num_test=10_000, image_size=SIZE, num_classes=10
)
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def split_model(cut: int) -> SplitModel:
    raw = default_config()
    raw.update({"cut": cut, "bottleneck": "C4S2"})
    return model_of(resolve(check_types(raw), CIFAR10))


def ours(cut: int, shape: DecoderShape, images: np.ndarray, epochs: int) -> list[float]:
    """Trains the decoder; the time at the end of each epoch."""
    net = split_model(cut).client
    params = net.init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    attack = Attack(
        send=partial(_send, net),
        decoder=Decoder(shape, SIZE),
        mean=MEAN,
        std=STD,
        epochs=epochs,
        batch_size=BATCH,
        devices=suitable_devices(),
    )
    ticks: list[float] = []

    def tick(epoch: Epoch) -> None:
        ticks.append(time.perf_counter())

    train_decoder(attack, params, images[:TRAIN], images[TRAIN:], tick)
    return ticks


def _send(net: Any, params: Any, images: jax.Array, key: jax.Array) -> jax.Array:
    return net.apply({"params": params}, images)


def theirs(cut: int, shape: DecoderShape, images: np.ndarray, epochs: int) -> list[float]:
    """The same in PyTorch."""
    torch = importlib.import_module("torch")
    nn, F = torch.nn, torch.nn.functional
    client = _torch_client(nn, cut).eval()
    latent = client(torch.zeros(1, 3, SIZE, SIZE)).shape
    decoder = _torch_decoder(nn, shape, latent[1], doublings(latent[2], SIZE))
    adam = torch.optim.Adam(decoder.parameters(), lr=1e-3)
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    train, validate = pixels[:TRAIN], pixels[TRAIN:]

    def latents(batch: Any) -> Any:
        with torch.no_grad():
            return client((batch - 0.5) / 0.25)

    ticks = []
    for _ in range(epochs):
        decoder.train()
        for batch in train[torch.randperm(TRAIN)].split(BATCH):
            adam.zero_grad()
            F.mse_loss(decoder(latents(batch)), batch).backward()
            adam.step()
        decoder.eval()
        with torch.no_grad():
            for batch in validate.split(BATCH):
                F.mse_loss(decoder(latents(batch)), batch).item()
        ticks.append(time.perf_counter())
    return ticks


def _torch_client(nn: Any, cut: int) -> Any:
    """Stem, residual blocks and the first convolution of the bottleneck; weight standardisation
    changes the kernels of a frozen client once, and is left out."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                *(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.GroupNorm(16, 64), nn.ReLU()),
                *(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.GroupNorm(16, 64)),
            )

        def forward(self, x: Any) -> Any:
            return (x + self.body(x)).relu()

    stem = (nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.GroupNorm(16, 64), nn.ReLU())
    narrow = nn.Conv2d(64, 4, 3, stride=2, padding=1)
    return nn.Sequential(*stem, *(Block() for _ in range(cut - 1)), narrow)


def _torch_decoder(nn: Any, shape: DecoderShape, inputs: int, doubled: int) -> Any:
    """`models.decoder.Decoder`, of residual blocks and with BatchNorm."""

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                *(nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, 3, padding=1)),
                *(nn.BatchNorm2d(outputs), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1)),
            )
            widen = (nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
            self.shortcut = nn.Sequential(*(widen if inputs != outputs else ()))

        def forward(self, x: Any) -> Any:
            return self.shortcut(x) + self.body(x)

    c = shape.channels
    layers = [Block(inputs, c), nn.ReLU()]
    for _ in range(shape.blocks):
        layers += [Block(c, c), nn.ReLU()]
    for _ in range(doubled):
        up = nn.ConvTranspose2d(c, c, 3, stride=2, padding=1, output_padding=1)
        layers += [up, nn.BatchNorm2d(c), nn.ReLU()]
    for _ in range(max(0, 2 - doubled)):
        layers += [Block(c, c), nn.ReLU()]
    return nn.Sequential(*layers, Block(c, 3), nn.Sigmoid())


def measure(cut: int, decoder: str, epochs: int, repeats: int) -> dict[str, Any]:
    shape = parse_decoder(decoder)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (TRAIN + VALIDATE, SIZE, SIZE, 3), dtype=np.uint8)
    whole: dict[str, list[float]] = {"ours": [], "PyTorch": []}
    epoch: dict[str, list[float]] = {"ours": [], "PyTorch": []}
    for _ in range(repeats):
        for name, side in (("ours", ours), ("PyTorch", theirs)):
            jax.clear_caches()
            started = time.perf_counter()
            ticks = side(cut, shape, images, epochs)
            whole[name].append(time.perf_counter() - started)
            epoch[name].append(statistics.median(np.diff(ticks)))
    seconds = {name: statistics.median(values) for name, values in whole.items()}
    pace = {name: statistics.median(values) for name, values in epoch.items()}
    return {
        "cut": cut,
        "decoder": decoder,
        "epochs": epochs,
        **{f"seconds, {name}": value for name, value in seconds.items()},
        "ratio": seconds["ours"] / seconds["PyTorch"],
        **{f"seconds an epoch, {name}": value for name, value in pace.items()},
        "ratio of an epoch": pace["ours"] / pace["PyTorch"],
        "all turns": {name: [round(x, 2) for x in values] for name, values in whole.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cut", type=int, default=1)
    parser.add_argument("--decoder", default="res_normN4C64")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    use_virtual_devices(PARTS)
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.device_kind}, {platform.machine()}")
    figures = measure(args.cut, args.decoder, args.epochs, args.repeats)
    for name, value in figures.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

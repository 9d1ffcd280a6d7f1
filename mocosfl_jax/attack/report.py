"""What an attack leaves in DIR/attack/NAME, and what it says.

`begun.json`, written first, says whose folder it is; `decoder.safetensors`; `picture.png`;
`attack.json`, written last: the numbers of a finished attack.
"""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save

from mocosfl_jax import __version__
from mocosfl_jax.attack.images import AttackImages
from mocosfl_jax.attack.inversion import Trained
from mocosfl_jax.attack.options import Options
from mocosfl_jax.attack.quality import Quality
from mocosfl_jax.attack.victim import Victim
from mocosfl_jax.errors import InputError
from mocosfl_jax.machine import versions
from mocosfl_jax.run.checkpoint import digest
from mocosfl_jax.run.options import check_name
from mocosfl_jax.run.storage import read_json, write_bytes, write_json

Report = dict[str, Any]
"""What attack.json holds; `report_of` says what that is."""

PICTURED = 16
"""Images in the picture, the first targets."""

_LABELS = {"mse": "MSE", "ssim": "SSIM", "psnr": "PSNR (dB)"}


class AttackFolder:
    """DIR/attack/NAME.

    Raises: InputError: a name that is no plain name of a folder.
    """

    def __init__(self, workdir: Path, name: str):
        check_name(name)
        self.name, self.path = name, workdir / "attack" / name
        self._begun = self.path / "begun.json"
        self._report = self.path / "attack.json"

    @property
    def step(self) -> int | None:
        """Of the checkpoint that the attack in it began with; None: none has begun.

        Raises: InputError: a file that cannot be read.
        """
        return read_json(self._begun).get("step") if self._begun.exists() else None

    def check(self, mine: dict[str, Any]) -> None:
        """Args: mine: `identity_of` an attack, or a part of it.

        Raises: InputError: it is another attack's, or has files that cannot be read.
        """
        if not self._begun.exists():
            return
        begun = read_json(self._begun)
        if begun.get("run") != mine.get("run", begun.get("run")):
            raise InputError(
                "--name", self.name, "it holds an attack on another run: choose another name"
            )
        changed = [name for name in mine if begun.get(name) != mine[name]]
        if changed == [_STATE]:
            allowed = "the run has been trained anew since this attack: choose another name"
            raise InputError("--name", self.name, allowed)
        if changed:
            shown = [f"--{x} {begun.get(x)!r} -> {mine[x]!r}" for x in changed if x != _STATE]
            allowed = f"it holds an attack with other options ({', '.join(shown)})"
            allowed += ": choose another name, or the same options"
            raise InputError("--name", self.name, allowed)

    def begin(self, identity: dict[str, Any]) -> None:
        """Makes the folder this attack's. Raises: StorageError."""
        write_json(self._begun, identity)

    def finished(self) -> Report | None:
        """The report of an attack that is complete.

        Raises: InputError: a file that cannot be read.
        """
        return read_json(self._report) if self._report.exists() else None

    def finish(
        self,
        report: Report,
        trained: Trained,
        images_nHWC: NDArray[np.uint8],
        answers_nHWC: NDArray[np.float32],
    ) -> None:
        """Writes the results, the numbers last.

        Args: images_nHWC, answers_nHWC: the first targets and their reconstructions.
        Raises: StorageError.
        """
        write_bytes(self.path / "decoder.safetensors", _decoder_file(report, trained))
        write_bytes(self.path / "picture.png", picture(images_nHWC, answers_nHWC))
        write_json(self._report, report)


_STATE = "client_state"


def identity_of(options: Options, victim: Victim) -> dict[str, Any]:
    """What tells an attack from others. client_state: a digest; a run that is trained again in its
    folder may end elsewhere, on another machine say."""
    return {
        "run": victim.run,
        _STATE: digest(victim.participant, {}),
        "step": victim.step,
        **dataclasses.asdict(options),
    }


def report_of(
    options: Options,
    victim: Victim,
    images: AttackImages,
    trained: Trained,
    found: Quality,
    trivial: Quality,
) -> Report:
    """The numbers of an attack, ready for JSON.

    Args:
      found: of the reconstructions. trivial: of the attacker that answers every latent with the
        mean auxiliary image.
    Returns: what was attacked and how; of each measure mean and std over the targets; the same
    under `trivial`; `mse_ratio`, mean error over that of the trivial attacker: 1 or more says that
    the latents told nothing.
    """
    ours, theirs = found.summary(), trivial.summary()
    return {
        **identity_of(options, victim),
        "client": victim.client,
        "latent_shape": list(victim.latent_shape),
        "auxiliary_images": len(images.train) + len(images.validate),
        "target_images": len(images.targets),
        "best_epoch": trained.epoch.number,
        "validation_mse": trained.epoch.validation_mse,
        **ours,
        "trivial": theirs,
        "mse_ratio": ours["mse"]["mean"] / max(theirs["mse"]["mean"], 1e-10),
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
    }


def table(report: Report) -> str:
    """The end of an attack in a few lines."""
    lines = [
        f"decoder of epoch {report['best_epoch']}, {report['target_images']:,} images, "
        "mean ± standard deviation:",
        f"  {'':<9}  {'attacker':>16}  {'mean image':>16}",
    ]
    for name, label in _LABELS.items():
        digits = 2 if name == "psnr" else 4
        cells = [
            f"{part[name]['mean']:.{digits}f} ± {part[name]['std']:.{digits}f}"
            for part in (report, report["trivial"])
        ]
        lines.append(f"  {label:<9}  {cells[0]:>16}  {cells[1]:>16}")
    lines.append(f"  {'MSE ratio':<9}  {report['mse_ratio']:>16.4f}")
    return "\n".join(lines)


def picture(images_nHWC: NDArray[np.uint8], answers_nHWC: NDArray[np.float32]) -> bytes:
    """PNG: originals in the upper row, their reconstructions below, small ones enlarged."""
    answers = np.rint(np.clip(answers_nHWC, 0, 1) * 255).astype(np.uint8)
    rows = [np.concatenate(list(row), axis=1) for row in (images_nHWC, answers)]
    scale = max(1, 96 // images_nHWC.shape[1])
    pixels = np.concatenate(rows).repeat(scale, axis=0).repeat(scale, axis=1)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    return content.getvalue()


def _decoder_file(report: Report, trained: Trained) -> bytes:
    """Tensors under names such as `params/layer0/conv1/kernel`; as metadata, what they are of."""
    leaves = jax.tree_util.tree_leaves_with_path(trained.variables)
    tensors = {
        jax.tree_util.keystr(keys, simple=True, separator="/"): np.ascontiguousarray(leaf)
        for keys, leaf in leaves
    }
    names = ("run", "step", "client", "decoder", "latent_shape", "best_epoch")
    said = {**{name: report[name] for name in names}, "version": __version__}
    return save(tensors, {"mocosfl_jax": json.dumps(said)})

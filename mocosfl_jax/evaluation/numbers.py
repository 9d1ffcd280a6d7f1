"""Every number that a run or an attack on it reports: its name, its label and its unit.

A new evaluation adds its numbers to `NUMBERS`. The checks of a stored summary, the table at the end
of a run and the report of a sweep follow from that. A sweep calls a number of the summary by its
name there, which is `transfer/NAME/knn_top1` for the data set NAME that the run was not trained on,
and a number of an attack by its place in the run's folder: `attack/NAME/mse_ratio`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

TOP1 = "top-1 %"
"""Unit of an accuracy on the test images: percent of images whose first guess is right."""


@dataclass(frozen=True)
class Number:
    """One number of summary.json, or of an attack's attack.json."""

    name: str  # key in that file; a dot leads into an object
    label: str  # in tables and plots
    unit: str = ""  # empty for a plain count
    required: bool = False  # True: every summary has it. False: it may be missing or null.
    in_table: bool = False  # whether the table at the end of a run shows it
    in_csv: bool = False  # whether report.csv of a sweep has it even if the sweep does not name it
    digits: int = 2  # decimals in the report of a sweep

    @property
    def title(self) -> str:
        """Label and unit, as a report writes them: `kNN, top-1 %`."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    @property
    def is_accuracy(self) -> bool:
        return self.unit == TOP1


_IN_ORDER = (
    Number("linear_top1", "linear probe", TOP1, in_table=True, in_csv=True),
    Number("linear_top1_best_test_epoch", "linear probe, best test epoch", TOP1, in_csv=True),
    Number(
        "semi_10_top1",
        "semi-supervised probe, 10 % of labels",
        TOP1,
        in_table=True,
        in_csv=True,
    ),
    Number("semi_1_top1", "semi-supervised probe, 1 % of labels", TOP1, in_table=True, in_csv=True),
    Number("knn_top1", "kNN", TOP1, in_table=True, in_csv=True),
    Number(
        "linear_top1_released", "linear probe with noise or random pruning", TOP1, in_table=True
    ),
    Number("knn_top1_released", "kNN with noise or random pruning", TOP1, in_table=True),
    Number("knn_top1_at_init", "kNN at the start", TOP1, in_table=True, in_csv=True),
    Number(
        "knn_top1_raw_pixels",
        "kNN of raw pixels, at most 32x32",
        TOP1,
        in_table=True,
        in_csv=True,
    ),
    Number("steps", "steps", required=True, in_csv=True),
    Number("rounds", "rounds", in_csv=True),
    Number("images_per_second", "training speed", "images/s", in_csv=True),
    Number("compile_seconds", "compile time", "s", in_csv=True),
    Number("wall_seconds", "wall time", "s", required=True, in_csv=True),
    Number("peak_memory_bytes", "peak memory", "bytes", in_csv=True),
    Number("bytes_up_per_client_round", "sent by a client in a round", "bytes", digits=0),
    Number("bytes_down_per_client_round", "received by a client in a round", "bytes", digits=0),
    Number("bytes_down_per_client_once", "received by a client once", "bytes", digits=0),
    Number("bytes_up", "sent by all clients", "bytes", digits=0),
    Number("bytes_down", "received by all clients", "bytes", digits=0),
    Number("bytes_saved_percent", "bytes saved", "%"),
    Number("epsilon", "epsilon", in_csv=True),
    Number("releases_of_an_image", "latents sent of an image, at most"),
    Number("client_params", "client parameters"),
    Number("server_params", "server parameters"),
    Number("test_images", "test images", required=True),
    Number("devices", "devices"),
    Number("processes", "processes"),
)

NUMBERS = {number.name: number for number in _IN_ORDER}
"""Those of summary.json by name, the most important first."""

_OF_AN_ATTACK = (
    Number("mse_ratio", "MSE over the trivial attacker's", in_csv=True, digits=3),
    Number("mse.mean", "MSE", in_csv=True, digits=4),
    Number("mse.std", "std of MSE over images", digits=4),
    Number("ssim.mean", "SSIM", in_csv=True, digits=3),
    Number("ssim.std", "std of SSIM over images", digits=3),
    Number("psnr.mean", "PSNR", "dB", in_csv=True),
    Number("psnr.std", "std of PSNR over images", "dB"),
)

ATTACK_NUMBERS = {number.name: number for number in _OF_AN_ATTACK}
"""Those of attack.json by name, the most important first."""


TRANSFER_NUMBERS = {
    name: NUMBERS[name]
    for name in (
        "linear_top1",
        "linear_top1_best_test_epoch",
        "semi_10_top1",
        "semi_1_top1",
        "knn_top1",
        "test_images",
    )
}
"""Those of a transfer by the last part of their name in summary.json."""

FAMILIES: Mapping[str, Mapping[str, Number]] = {
    "attack": ATTACK_NUMBERS,
    "transfer": TRANSFER_NUMBERS,
}
"""Numbers of which a run may have several sets, each with a name: `FAMILY/NAME/NUMBER`."""


def number_of(name: str) -> Number:
    """The number that a sweep calls so: `knn_top1`, `attack/NAME/ssim.mean` or
    `transfer/NAME/knn_top1`, with the attack or the transfer in its label.

    Raises: KeyError: there is no such number.
    """
    match name.split("/"):
        case [plain]:
            return NUMBERS[plain]
        case [family, given, key] if family in FAMILIES and given:
            number = FAMILIES[family][key]
            which = given if family == "attack" else f"{family} to {given}"
            return dataclasses.replace(number, name=name, label=f"{number.label} ({which})")
    raise KeyError(name)


def images_behind(name: str) -> str:
    """The number of test images that an accuracy was measured on, by the names of both."""
    place, _, _ = name.rpartition("/")
    return f"{place}/test_images" if place else "test_images"

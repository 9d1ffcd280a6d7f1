"""Every number that a run reports: its name in summary.json, its label and its unit.

A new evaluation adds its numbers to `NUMBERS`. The checks of a stored summary, the table at the end
of a run and the report of a sweep follow from that.
"""

from dataclasses import dataclass

TOP1 = "top-1 %"
"""Unit of an accuracy on the test images: percent of images whose first guess is right."""


@dataclass(frozen=True)
class Number:
    """One number of summary.json."""

    name: str  # key in summary.json
    label: str  # in tables and plots
    unit: str = ""  # empty for a plain count
    required: bool = False  # True: every summary has it. False: it may be missing or null.
    in_table: bool = False  # whether the table at the end of a run shows it
    in_csv: bool = False  # whether report.csv of a sweep has it even if the sweep does not name it

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
    Number("knn_top1", "kNN", TOP1, in_table=True, in_csv=True),
    Number("knn_top1_at_init", "kNN of the untrained encoder", TOP1, in_table=True, in_csv=True),
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
    Number("bytes_up_per_client_round", "sent by a client in a round", "bytes"),
    Number("bytes_down_per_client_round", "received by a client in a round", "bytes"),
    Number("client_params", "client parameters"),
    Number("server_params", "server parameters"),
    Number("test_images", "test images", required=True),
    Number("devices", "devices"),
    Number("processes", "processes"),
)

NUMBERS = {number.name: number for number in _IN_ORDER}
"""All of them by name, the most important first."""

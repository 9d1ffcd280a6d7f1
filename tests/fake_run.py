"""Stands in for `mocosfl_jax.main` in tests of sweeps: same command line, no training.

A run's result follows from its fields. FAKE_RUN says what else happens, by clients and seed:
`10/1=fail` prints two lines and fails; `10/1=wait` runs until SIGTERM, saves and exits with 143.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main(argv: list[str]) -> int:
    workdir = Path(argv[argv.index("--workdir") + 1])
    settings = [
        a.removeprefix("--config.").split("=", 1) for a in argv if a.startswith("--config.")
    ]
    fields = dict(settings)
    clients, seed = int(fields["num_clients"]), int(fields["seed"])
    behaviour = dict(entry.split("=") for entry in os.environ.get("FAKE_RUN", "").split())
    with (workdir / "calls").open("a") as calls:
        print(os.environ.get("CUDA_VISIBLE_DEVICES", "none"), file=calls)
    match behaviour.get(f"{clients}/{seed}"):
        case "fail":
            print("some words\nwhat went wrong\n")
            return 1
        case "wait":
            wait_for_sigterm(workdir)
    summary = {"linear_top1": 60.0 + seed - clients / 10, "knn_top1": None, "steps": clients}
    (workdir / "summary.json").write_text(json.dumps(summary))
    print("done")
    return 0


def wait_for_sigterm(workdir: Path) -> None:
    """Saves and exits with 143, but for a second try, which goes on."""
    if (workdir / "saved").exists():
        return

    def save(*_: object) -> None:
        (workdir / "saved").write_text("state")
        sys.exit(143)

    signal.signal(signal.SIGTERM, save)
    (workdir / "ready").write_text("")
    deadline = time.monotonic() + 120  # leaves nothing behind where a test fails
    while time.monotonic() < deadline:
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main(sys.argv))

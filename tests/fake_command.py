"""Stands in for `mocosfl_jax.attack` in tests of sweeps: the same files, nothing is attacked.

`--name NAME --ratio X` writes that MSE ratio; the command that FAKE_COMMAND names fails.
"""

import argparse
import json
import os
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--ratio", type=float, default=0.5)
    options = parser.parse_args()
    with (options.workdir / "calls").open("a") as calls:
        print(options.name, file=calls)
    if os.environ.get("FAKE_COMMAND") == options.name:
        print("why it failed")
        return 3
    folder = options.workdir / "attack" / options.name
    folder.mkdir(parents=True, exist_ok=True)
    steps = json.loads((options.workdir / "summary.json").read_text())["steps"]
    report = {"step": steps, "mse_ratio": options.ratio, "ssim": {"mean": 0.25, "std": 0.125}}
    (folder / "attack.json").write_text(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())

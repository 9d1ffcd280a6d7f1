"""What version 0.1.0 left behind loads, resumes and answers.

`tests/version_0_1` holds work directories stopped by SIGTERM at step 9 of 12, in the middle of
round 2. Version 0.1.0 wrote `persistent`, whose clients have momentum models of their own, and
`private_queues`. `before_layout` was written after it, by the last state of the package before
checkpoints said their layout: it has a seal, and aligned clients. Beside each lies the encoder of
the same run without the stop; `answers.npz` has what that of `persistent` says, and the losses and
kNN accuracy of the uninterrupted runs (seed 0, JAX 0.10.2 on a CPU, 2026-11-24 and 2026-11-26).
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mocosfl_jax import load_encoder
from mocosfl_jax.config import check_types, default_config
from mocosfl_jax.config.data import data_options
from mocosfl_jax.config.resolve import resolve
from mocosfl_jax.data.sources import inspect_dataset, load_dataset
from mocosfl_jax.errors import InputError
from mocosfl_jax.run.checkpoint import Identity, data_digest
from mocosfl_jax.run.workdir import WorkDir, read_stored
from mocosfl_jax.train import train
from tests import tiny

FILES = Path(__file__).with_name("version_0_1")
FIELDS = {
    **tiny.FIELDS,
    "dataset": "synthetic",
    "image_size": 8,
    "cohort_size": 3,
    "rounds": 2,
    "learning_rate": 0.003,
    "schedule": "constant",
    "augmentation": "v1",
    "knn_every": 0,
    "probe_epochs": 0,
    "keep_checkpoints": 1,
}
RUNS = {
    "persistent": {},
    "private_queues": {"feature_sharing": False, "loss": "one_way"},
    "before_layout": {"blocks_per_stage": (1,), "loss": "client", "align_momentum": True},
}


def resume(workdir: Path, **fields) -> dict:
    raw = default_config()
    raw.update({**FIELDS, **fields})
    config = check_types(raw)
    options = data_options(config)
    config = resolve(config, inspect_dataset(config.dataset, **options))
    held = WorkDir(workdir)
    try:
        return train(config, load_dataset(config.dataset, **options), held)
    finally:
        held.close()


@pytest.fixture(scope="module")
def answers() -> dict[str, np.ndarray]:
    return dict(np.load(FILES / "answers.npz"))


def unpacked(name: str, folder: Path) -> Path:
    """The work directory of that name, below the folder."""
    with tarfile.open(FILES / f"{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / name


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(name, answers, tmp_path, capsys):
    summary = resume(unpacked(name, tmp_path), **RUNS[name])
    assert "resumed at step 9 of 12" in capsys.readouterr().out
    text = (tmp_path / name / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in lines] == list(range(13))
    loss = [line["loss"] for line in lines[1:]]
    np.testing.assert_allclose(loss, answers[f"{name}_loss"], rtol=1e-3)
    assert abs(summary["knn_top1"] - answers[f"{name}_knn_top1"]) < 0.5
    got, want = (load_file(f) for f in (tmp_path / name / "encoder.safetensors", encoder_of(name)))
    assert got.keys() == want.keys()
    for tensor in want:
        scale = np.abs(want[tensor]).max()
        np.testing.assert_allclose(got[tensor], want[tensor], atol=1e-3 * scale, err_msg=tensor)


def test_damage_is_found_in_a_former_layout(tmp_path):
    folder = unpacked("before_layout", tmp_path)
    clock = folder / "checkpoints" / "9" / "clock" / "metadata"
    clock.write_text(clock.read_text().replace('"monitored_step": 0', '"monitored_step": 1'))
    with pytest.raises(InputError, match=r"\(9: damaged: its digest does not match\)"):
        resume(folder, **RUNS["before_layout"])


def test_a_run_keeps_its_identity(tmp_path):
    """Else a finished one would be trained again. It is what the same run's summary.json had."""
    stored = read_stored(unpacked("before_layout", tmp_path))
    assert Identity(stored.config, data_digest(stored.data)).digest == "c37ff30fa4436945"


def encoder_of(name: str) -> Path:
    return FILES / f"{name}.safetensors"


def test_an_encoder_file_answers(answers):
    images = (np.arange(5 * 8 * 8 * 3).reshape(5, 8, 8, 3) * 7 % 251).astype(np.uint8)
    encoder = load_encoder(encoder_of("persistent"))
    np.testing.assert_allclose(encoder(images), answers["features"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(encoder.embed(images), answers["embedding"], rtol=1e-3, atol=1e-5)

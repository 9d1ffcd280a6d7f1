"""A strict environment: what a test forgets to say must fail, not pass by chance.

These lines run before any test module imports JAX.
"""

import importlib.metadata
import os
import signal
import tempfile

FLAGS = [
    "--xla_force_host_platform_device_count=8",  # for tests of several devices
    "--xla_backend_optimization_level=0",  # tests compile much and run little
    "--xla_cpu_parallel_codegen_split_count=1",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # 0.12 ends at a flag it does not know
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # a third of the time to compile
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_cache = tempfile.TemporaryDirectory()  # programs that several tests, or their processes, compile
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def npz(tmp_path):
    """The images of a tiny run, alone in a folder."""
    from tests import tiny

    return tiny.write_npz(tmp_path / "images.npz")


@pytest.fixture
def no_gpu(monkeypatch):
    """No GPU, whatever the machine has, and fake runs that all go well."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("FAKE_RUN", raising=False)


@pytest.fixture
def stop_at(monkeypatch):
    """Sends SIGTERM, once, when so many steps are logged; the dispatch behind still finishes."""
    from mocosfl_jax.run.progress import Progress

    advance = Progress.advance

    def arm(step: int) -> None:
        def advance_and_stop(self, steps, loss, images_per_second):
            advance(self, steps, loss, images_per_second)
            if self._step == step:
                monkeypatch.setattr(Progress, "advance", advance)
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(Progress, "advance", advance_and_stop)

    return arm

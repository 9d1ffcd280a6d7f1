"""A strict environment: what a test forgets to say must fail, not pass by chance.

These lines run before any test module imports JAX.
"""

import os
import tempfile

FLAGS = (
    "--xla_force_host_platform_device_count=8",  # for tests of several devices
    "--xla_backend_optimization_level=0",  # tests compile much and run little
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_cache = tempfile.TemporaryDirectory()  # programs that several tests, or their processes, compile
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

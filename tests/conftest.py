"""Eight virtual CPU devices for the mesh tests, set before jax is first imported; programs compiled in a hurry, and room for
all of them.
"""

import gc
import os
import pathlib

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Commands that tests run keep no programs in the cache of whoever runs them.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
# Nearly all programs here run for a moment, and take longer to compile: without LLVM's expensive passes, a third less.
# XLA's own passes, which the tests of compiled programs read, stay. Children inherit it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()

MEMORY_MAPS = pathlib.Path("/proc/self/maps")


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_forgotten():
    """After a file, where many have come together: each holds a few of the 65,530 maps that Linux gives a process."""
    yield
    if MEMORY_MAPS.exists() and MEMORY_MAPS.read_text().count("\n") > 15_000:
        import jax

        jax.clear_caches()
        gc.collect()

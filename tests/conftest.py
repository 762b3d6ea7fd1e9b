"""Eight virtual CPU devices for the mesh tests; set before jax is first imported."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Commands that tests run keep no programs in the cache of whoever runs them.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()

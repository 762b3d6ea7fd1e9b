"""What JAX is told before it starts, in one place: where compiled programs are kept, what a GPU is asked for, and what
becomes of memory on a CPU.

Whatever the user has set stands. Everything is said in the environment too, for the processes that this one starts; those
call `configure` as well, since not all of it is read there.
"""

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import pathlib
import platform
from collections.abc import MutableMapping

import jax

logger = logging.getLogger(__name__)

Environment = MutableMapping[str, str]

CACHE_DIR = "JAX_COMPILATION_CACHE_DIR"
"""Where compiled programs are kept. A bucket, or a folder that all hosts see, spares all but the first the compiling."""

KEPT_FROM = ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
"""The seconds of compiling from which on a program is kept. JAX keeps those of a second and more; of a small network most
take less, and every process of a study would compile them again."""

CACHE_SWITCH = "JAX_ENABLE_COMPILATION_CACHE"
"""`false` keeps none."""

GPU_MEMORY = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
"""JAX takes three quarters of a GPU's memory by itself; nothing else is to run beside a training run."""

GPU_OPTIMISATION = ("JAX_OPTIMIZATION_LEVEL", "O1")
"""Collectives overlap with computing, loops are double-buffered: what many single flags used to ask for. On other
platforms it would change nothing, or only how long compiling takes."""

KEPT_MEMORY = {
    "MALLOC_MMAP_MAX_": (-4, 0),
    "MALLOC_TRIM_THRESHOLD_": (-1, -1),
}
"""By the name of its environment variable, what glibc's `mallopt` is told: its number there, and a value.

A step asks for all its temporary memory at once and gives it back. By default that goes to the system and back, one page
fault for every 4 KiB: 0.17 of the 0.68 CPU-seconds of a small network's SFT step.
"""

ONE_ARENA = {"MALLOC_ARENA_MAX": (-8, 1)}
"""The same, for processes that use large blocks: the threads of JAX would keep to arenas of their own, in which no block over
64 MiB stays.

In a single arena what the compiler leaves behind lies among what a step asks for, and glibc walks through thousands of free
pieces at every call. A process that compiles many programs of a small network, as those of a study do, is better off without:
compiling takes two thirds of the time, and a step of the quickstart 16.6 ms in place of 19.1.
"""

ONE_AT_A_TIME = ("JAX_CPU_ENABLE_ASYNC_DISPATCH", "false")
"""A step that is started before the last one has given its temporary memory back needs as much once more, and what is taken
in that order leaves gaps: SFT of a network of 30 M parameters took 6.0 GB, and 2.8 one at a time, at the same rate."""

COMPILED, LONG = "/jax/core/compile/backend_compile_duration", 1.0
"""What JAX calls it when it has compiled, and the seconds that leave behind enough to be given back."""


def configure(
    environment: Environment = os.environ,
    *,
    keep_programs: bool = True,
    one_arena: bool = True,
) -> None:
    """Sets defaults; call it before anything touches a device.

    Args:
      environment: of this process.
      keep_programs: keep compiled programs on disk, so that the next run starts at once.
      one_arena: see `ONE_ARENA`; this is each process's own, and not handed on in the environment.
    """
    if keep_programs:
        _keep_programs(environment)
    if not wants_accelerator(environment):
        _run_one_at_a_time(environment)
        _keep_memory(environment, one_arena)
    if wants_gpu(environment):
        environment.setdefault(*GPU_MEMORY)
        name, level = GPU_OPTIMISATION
        if name not in environment:
            environment[name] = level
            jax.config.update("jax_optimization_level", level)


def wants_gpu(environment: Environment) -> bool:
    """Whether JAX is going to use a GPU: it is named in JAX_PLATFORMS, or nothing is and the plug-in is installed."""
    named = environment.get("JAX_PLATFORMS", "")
    if named:
        return any(each in ("cuda", "gpu", "rocm") for each in named.split(","))
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    plugins = ("xla_cuda12", "xla_cuda13", "xla_rocm60", "xla_rocm7")
    return any(importlib.util.find_spec(f"jax_plugins.{each}") for each in plugins)


def wants_accelerator(environment: Environment) -> bool:
    """Whether JAX is going to use anything but the CPU."""
    named = environment.get("JAX_PLATFORMS", "")
    if named:
        return named != "cpu"
    return wants_gpu(environment) or importlib.util.find_spec("libtpu") is not None


def default_cache(environment: Environment) -> pathlib.Path:
    """A folder of the user's own cache, one for each version of JAX and kind of processor.

    A home directory may be shared by machines; a program that was compiled for one processor may stop another one.
    """
    base = environment.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "gvjax" / f"jax-{jax.__version__}-{_processor()}"


def _keep_programs(environment: Environment) -> None:
    if CACHE_DIR in environment or environment.get(CACHE_SWITCH, "").lower() in (
        "false",
        "0",
    ):
        return
    directory = default_cache(environment)
    try:
        # What lies there is run: nobody else may write to it.
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        logger.warning(
            "compiled programs are not kept: %s cannot be made (%s); set %s to a folder that can",
            directory,
            error.strerror,
            CACHE_DIR,
        )
        return
    environment[CACHE_DIR] = str(directory)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    name, least = KEPT_FROM
    if name not in environment:
        environment[name] = least
        jax.config.update("jax_persistent_cache_min_compile_time_secs", float(least))


def _run_one_at_a_time(environment: Environment) -> None:
    """Not where one CPU plays several devices: they wait for each other, and must all have been started."""
    name, value = ONE_AT_A_TIME
    several = "--xla_force_host_platform_device_count" in environment.get(
        "XLA_FLAGS", ""
    )
    if name not in environment and (several or "JAX_NUM_CPU_DEVICES" in environment):
        return
    # Unlike its other settings, JAX does not read this one in the environment.
    asynchronous = environment.setdefault(name, value).lower() not in ("false", "0")
    jax.config.update("jax_cpu_enable_async_dispatch", asynchronous)


def _keep_memory(environment: Environment, one_arena: bool) -> None:
    """Has glibc keep what is freed; other libraries of C have no `mallopt`, and are left alone."""
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    for name, (parameter, value) in KEPT_MEMORY.items():
        if name not in environment:
            environment[name] = str(value)
            library.mallopt(parameter, value)
    for name, (parameter, value) in ONE_ARENA.items():
        if one_arena and name not in environment:
            library.mallopt(parameter, value)
    _give_back_after_compiling()


def give_back() -> None:
    """Memory that was freed and that glibc keeps for later goes back to the system; elsewhere nothing happens."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@functools.cache
def _give_back_after_compiling() -> None:
    """Compiling a small network's step takes 260 MB, in pieces that no step can use: they go back to the system."""

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED and duration_secs > LONG:
            give_back()

    jax.monitoring.register_event_duration_secs_listener(listen)


def _processor() -> str:
    """Short digest of what this processor can do."""
    found = [platform.machine(), platform.processor()]
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        for name in ("model name", "flags", "Features"):
            found += [line for line in lines if line.startswith(name)][:1]
    except OSError:
        # Not Linux; machine and processor must do.
        pass
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:12]

"""What JAX is told before it starts, and what it is not."""

import os
import pathlib
import subprocess
import sys
import types

import jax
import pytest

from gvjax import runtime


@pytest.fixture(autouse=True)
def _as_before():
    names = (
        "jax_compilation_cache_dir",
        "jax_optimization_level",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    # Cannot be read; this is JAX's own.
    jax.config.update("jax_cpu_enable_async_dispatch", True)


def test_programs_are_kept_in_the_users_cache(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    runtime.configure(environment)
    directory = pathlib.Path(environment["JAX_COMPILATION_CACHE_DIR"])
    assert directory.parent == tmp_path / "gvjax"
    assert jax.__version__ in directory.name
    assert directory.stat().st_mode & 0o077 == 0
    assert jax.config.jax_compilation_cache_dir == str(directory)
    # Those of a small network too, in this process and in its children.
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.1
    assert environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0.1"
    # Not a GPU's.
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in environment
    assert "JAX_OPTIMIZATION_LEVEL" not in environment


@pytest.mark.parametrize(
    "given",
    [{"JAX_COMPILATION_CACHE_DIR": "/mine"}, {"JAX_ENABLE_COMPILATION_CACHE": "false"}],
)
def test_what_the_user_says_of_it_stands(given, tmp_path):
    environment = {**given, "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cuda"}
    environment |= dict([runtime.GPU_MEMORY, runtime.GPU_OPTIMISATION])
    before = dict(environment)
    runtime.configure(environment)
    assert environment == before
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_made_is_said_and_the_run_goes_on(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    environment = {"XDG_CACHE_HOME": str(tmp_path / "file"), "JAX_PLATFORMS": "cpu"}
    runtime.configure(environment)
    assert "compiled programs are not kept" in caplog.text
    assert "JAX_COMPILATION_CACHE_DIR" not in environment


def test_a_gpu_is_asked_for_more():
    environment = {"JAX_PLATFORMS": "cuda,cpu"}
    runtime.configure(environment, keep_programs=False)
    assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.9"
    assert environment["JAX_OPTIMIZATION_LEVEL"] == "O1"
    assert str(jax.config.jax_optimization_level).endswith("O1")
    assert "JAX_COMPILATION_CACHE_DIR" not in environment


def test_what_the_user_asks_of_a_gpu_stands():
    given = {
        "JAX_PLATFORMS": "cuda",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5",
        "JAX_OPTIMIZATION_LEVEL": "O2",
    }
    environment = dict(given)
    runtime.configure(environment, keep_programs=False)
    assert environment == given


def test_freed_memory_is_kept_for_the_next_step():
    """A program with 64 MB of temporary memory: later runs find them where the second left them.

    The least of three, since a busy machine may take pages away meanwhile.
    """
    code = """
import resource, sys
import jax, jax.numpy as jnp
from gvjax import runtime
if sys.argv[1:]:
    runtime.configure(keep_programs=False)
program = jax.jit(lambda x: jnp.cos(x @ x.T) @ x)
x = jnp.zeros((2**12, 8))
faults = []
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[2:]))
"""
    environment = {
        name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ
    }
    environment["JAX_PLATFORMS"] = "cpu"

    def faults(*arguments: str) -> int:
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert faults("configured") < 1000 < faults()


ONE_DEVICE = {"XLA_FLAGS": ""}


@pytest.mark.parametrize(
    ("said", "ready"),
    [
        (ONE_DEVICE, "True"),
        (ONE_DEVICE | {"JAX_CPU_ENABLE_ASYNC_DISPATCH": "false"}, "True"),
        (ONE_DEVICE | {"JAX_CPU_ENABLE_ASYNC_DISPATCH": "true"}, "False"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, "False"),
    ],
    ids=["one device", "said by the parent", "said otherwise", "two devices"],
)
def test_a_program_of_one_cpu_is_done_before_the_next_is_started(said, ready):
    code = """
import jax, jax.numpy as jnp
from gvjax import runtime
runtime.configure(keep_programs=False)
program = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, y: jnp.cos(y @ x), x))
x = jnp.ones((512, 512))
program(x).block_until_ready()
print(program(x).is_ready())
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_CPU_ENABLE_ASYNC_DISPATCH", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | said,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == ready


def test_what_compiling_leaves_behind_is_given_back():
    """JAX says when it has compiled; a compilation of two seconds is told it, for to see one would take two seconds."""
    code = """
import re
import jax
from gvjax import runtime

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024

runtime.configure(keep_programs=False)
events = []
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
jax.jit(lambda x: x + 1)(1.0)
blocks = [bytearray(2**16) for _ in range(3200)]
above = bytearray(2**16)
full = resident()
del blocks
kept = resident()
jax.monitoring.record_event_duration_secs(runtime.COMPILED, 2.0)
print(events.count(runtime.COMPILED) > 0, full - kept, kept - resident())
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    compiled, freed, given_back = done.stdout.split()
    assert compiled == "True"
    assert int(freed) < 20 and int(given_back) > 150


def test_what_the_user_says_of_malloc_stands(monkeypatch):
    told = []
    library = types.SimpleNamespace(mallopt=lambda *arguments: told.append(arguments))
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(runtime.platform, "libc_ver", lambda: ("glibc", "2.36"))
    trim, arena = (
        runtime.KEPT_MEMORY["MALLOC_TRIM_THRESHOLD_"],
        runtime.ONE_ARENA["MALLOC_ARENA_MAX"],
    )
    environment = {
        "JAX_PLATFORMS": "cpu",
        "MALLOC_MMAP_MAX_": "4",
        "JAX_NUM_CPU_DEVICES": "8",
    }
    runtime.configure(environment, keep_programs=False)
    assert environment["MALLOC_MMAP_MAX_"] == "4"
    assert told == [trim, arena]
    # A child finds the former in its environment, where glibc has read it, and says the latter itself, or does without.
    assert "MALLOC_ARENA_MAX" not in environment
    runtime.configure(environment, keep_programs=False)
    assert told == [trim, arena, arena]
    runtime.configure(environment, keep_programs=False, one_arena=False)
    environment["MALLOC_ARENA_MAX"] = "4"
    runtime.configure(environment, keep_programs=False)
    runtime.configure({"JAX_PLATFORMS": "cuda"}, keep_programs=False)
    assert told == [trim, arena, arena]


@pytest.mark.parametrize(
    ("platforms", "installed", "expected"),
    [
        ("cpu", True, False),
        ("tpu,cpu", True, False),
        ("cuda", False, True),
        ("", True, True),
        ("", False, False),
    ],
)
def test_who_wants_a_gpu(platforms, installed, expected, monkeypatch):
    def find_spec(name):
        return object() if installed else None

    monkeypatch.setattr(runtime.importlib.util, "find_spec", find_spec)
    assert runtime.wants_gpu({"JAX_PLATFORMS": platforms}) is expected


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    """Through JAX itself: the same program, hits counted."""
    code = """
import jax, sys
from gvjax import runtime
runtime.configure()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
events = []
jax.monitoring.register_event_listener(lambda event, **more: events.append(event))
jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((64, 64))).block_until_ready()
print(sum(event.endswith("/cache_hits") for event in events))
"""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"):
        environment.pop(name, None)
    hits = [
        int(
            subprocess.run(
                [sys.executable, "-c", code],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for _ in range(2)
    ]
    assert hits[0] == 0 < hits[1]

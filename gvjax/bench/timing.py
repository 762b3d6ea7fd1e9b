"""Measuring: warm up, repeat, take the median, say how far the repeats lie apart."""

import dataclasses
import os
import pathlib
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gvjax import runtime, sharding
from gvjax.recipes.loop import Clock

WARM_UPS = 2
"""Calls before the first that counts: one compiles, one more lets caches and allocators settle."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Something to time, ready to run.

    Attributes:
      once: `(number of the call, clock) -> arrays to wait for`; parts of a round go on the clock.
      tokens: real tokens of one call, prompts and completions; 0 where that means nothing.
      samples: rows of one call (sequences, pairs, completions); 0 where that means nothing.
      flops: operations the mathematics needs; see `gvjax.models.cost`.
      moved: bytes that must be moved; None where operations are the bound.
      padding: share of the positions of a call that hold no token.
      reading: `(seconds of a call, seconds of its parts) -> seconds that count`.
      rest: what a call does that is not on the clock; "" where everything is, or nothing.
      compiled_memory: peak bytes on a device by the compiler's own account of the (training) program; None: unknown.
      planned_memory: peak bytes on a device of the whole recipe, as `gvjax plan` adds them up; None: it is no recipe.
    """

    once: Callable[[int, Clock], Any]
    tokens: int = 0
    samples: int = 0
    flops: float = 0.0
    moved: float | None = None
    padding: float = 0.0
    reading: Callable[[float, Mapping[str, float]], float] = lambda whole, parts: whole
    rest: str = ""
    compiled_memory: Callable[[], int | None] = lambda: None
    planned_memory: Callable[[], int | None] = lambda: None


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the machine does at best, measured.

    Attributes:
      flops: operations a second of a large matrix product on every device at once, all together.
      bytes: bytes a second read and written by a large copy on every device at once, all together.
    """

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; None is unknown or meaningless there.

    Attributes:
      name: what was timed.
      seconds: median over the repeats.
      spread: (slowest − fastest) / median.
      cpu_seconds: median processor time of this process; on a shared CPU a steadier yardstick than the clock. Where a
        row is a part of what was run, that part of it.
      tokens_per_second, samples_per_second: by the median.
      mfu: share of the measured matrix-product rate that the useful operations come to.
      of_bandwidth: share of the measured copy bandwidth that the bytes it must move come to.
      padding: share of positions without a token.
      shares: of the parts of a round.
      first_seconds: how much longer the first call took: tracing and compiling.
      peak_memory: bytes, the most that one device held while this row ran (on a CPU: this process, with its libraries
        and the compiler); None where nobody says, or where the peak cannot be forgotten (everywhere but on Linux CPUs)
        and an earlier row held more.
      compiled_memory: bytes, the compiler's account of the training program.
      planned_memory: bytes, what `gvjax plan` finds the recipe to need: its largest program, and what lies beside it.
    """

    name: str
    seconds: float
    spread: float
    cpu_seconds: float
    repeats: int
    tokens_per_second: float | None = None
    samples_per_second: float | None = None
    mfu: float | None = None
    of_bandwidth: float | None = None
    padding: float | None = None
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    first_seconds: float | None = None
    peak_memory: int | None = None
    compiled_memory: int | None = None
    planned_memory: int | None = None


def measure(name: str, work: Work, *, repeats: int, ceilings: Ceilings) -> Row:
    """Times a piece of work.

    Args:
      name: of the row.
      work: what to time.
      repeats: >= 1, calls that count.
      ceilings: what its rates are divided by.
    """
    peak = _PeakMemory()
    begun = time.perf_counter()
    jax.block_until_ready(work.once(0, Clock()))
    first = time.perf_counter() - begun
    for number in range(1, WARM_UPS):
        jax.block_until_ready(work.once(number, Clock()))
    seconds, wholes, cpu = list[float](), list[float](), list[float]()
    shares = list[dict[str, float]]()
    for number in range(WARM_UPS, WARM_UPS + repeats):
        clock = Clock()
        clock.waits = True
        begun, begun_cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(work.once(number, clock))
        whole = time.perf_counter() - begun
        wholes.append(whole)
        counted = work.reading(whole, clock.seconds)
        seconds.append(counted)
        cpu.append((time.process_time() - begun_cpu) * counted / whole)
        parts = {part: taken / whole for part, taken in clock.seconds.items()}
        if work.rest:
            parts[work.rest] = 1.0 - sum(parts.values())
        shares.append(parts)
    median = statistics.median(seconds)

    def rate(amount: float) -> float | None:
        # A difference of two measurements can come out negative on a busy machine; it has no rate then.
        return amount / median if amount and median > 0 else None

    flops, moved = rate(work.flops), rate(work.moved or 0)
    return Row(
        name=name,
        seconds=median,
        spread=(max(seconds) - min(seconds)) / median if median > 0 else float("inf"),
        cpu_seconds=statistics.median(cpu),
        repeats=repeats,
        tokens_per_second=rate(work.tokens),
        samples_per_second=rate(work.samples),
        mfu=None if flops is None or work.moved else flops / ceilings.flops,
        of_bandwidth=None if moved is None else moved / ceilings.bytes,
        padding=work.padding if work.tokens else None,
        shares={
            part: statistics.median(each.get(part, 0.0) for each in shares)
            for part in shares[0]
        },
        first_seconds=max(first - statistics.median(wholes), 0.0),
        peak_memory=peak.bytes(),
        compiled_memory=work.compiled_memory(),
        planned_memory=work.planned_memory(),
    )


def ceilings(mesh: Mesh, dtype: str, *, small: bool = False) -> Ceilings:
    """Measures the machine: a large matrix product and a large copy, on every device at once, the best of several.

    Operands are random: where power is the limit, the rate depends on the numbers, and a network's are not all equal.
    The devices of a CPU are one processor under several names, and one of them has all its cores.

    Args:
      mesh: the devices.
      dtype: of the product's inputs; sums are float32.
      small: sizes that take milliseconds, for tests.
    """
    accelerator = sharding.platform(mesh) != "cpu"
    size = 128 if small else 8192 if accelerator else 2048
    # Beyond every cache, or it would measure that.
    count = (2**16 if small else 2**28) // 4
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((size, size), np.float32).astype(jnp.dtype(dtype))
    numbers = rng.random(count, np.float32)
    devices = list(mesh.local_devices) if accelerator else [mesh.local_devices[0]]
    times = mesh.size / len(mesh.local_devices) * len(devices)
    return Ceilings(
        flops=times * 2 * size**3 / _best(product, matrix, devices),
        bytes=times * 2 * numbers.nbytes / _best(copy, numbers, devices),
    )


@jax.jit
def product(x: jax.Array) -> jax.Array:
    """A matrix by itself."""
    return jnp.dot(x, x, preferred_element_type=jnp.float32)


@jax.jit
def copy(x: jax.Array) -> jax.Array:
    """All numbers read, and as many written."""
    return x * 1.5


def _best(program, argument, devices: list[jax.Device], repeats: int = 10) -> float:
    """Seconds of a program on all devices at once."""
    placed = [jax.device_put(argument, device) for device in devices]
    jax.block_until_ready([program(each) for each in placed])
    # An accelerator is handed several at a time: waiting for each would count how long a launch takes.
    queued = 1 if devices[0].platform == "cpu" else 10
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready([program(each) for each in placed for _ in range(queued)])
        taken.append((time.perf_counter() - begun) / queued)
    return min(taken)


class _PeakMemory:
    """The most bytes held since this was made, where that can be known.

    Accelerators say what they held at most since the process began; that speaks of this row only if it rose. Linux
    forgets a process' peak on demand; the next one begins with what the process still holds, so what earlier rows let
    go of is given back first.
    """

    def __init__(self) -> None:
        runtime.give_back()
        self._before = _device_peak()
        self._resettable = False
        if self._before is None:
            try:
                pathlib.Path("/proc/self/clear_refs").write_text("5")
                self._resettable = True
            except OSError:
                self._before = _process_peak()

    def bytes(self) -> int | None:
        device = _device_peak()
        now = device if device is not None else _process_peak()
        risen = self._resettable or self._before is None or now > self._before
        return now if risen else None


def _device_peak() -> int | None:
    found = [
        stats["peak_bytes_in_use"]
        for device in jax.local_devices()
        if (stats := device.memory_stats()) and "peak_bytes_in_use" in stats
    ]
    return max(found, default=None)


def _process_peak() -> int:
    try:
        status = pathlib.Path("/proc/self/status").read_text()
        kilobytes = next(s for s in status.splitlines() if s.startswith("VmHWM"))
        return int(kilobytes.split()[1]) * 1024
    except (OSError, StopIteration):
        # Kilobytes on Linux, bytes on a Mac.
        unit = 1 if os.uname().sysname == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_limit() -> int | None:
    """Bytes that one device (on a CPU: the machine) has; None where nobody says."""
    for device in jax.local_devices():
        if (stats := device.memory_stats()) and "bytes_limit" in stats:
            return stats["bytes_limit"]
    if jax.default_backend() != "cpu":
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

"""One program compiled for devices that are not there, and what the compiler says it takes."""

import dataclasses
import re
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jaxlib.version
from jax.experimental import topologies

from gvjax.plan import hlo
from gvjax.plan.programs import Program
from gvjax.plan.targets import Target

_OUT_OF_MEMORY = re.compile(r"required.*?\((\d+(?:\.\d+)?)([KMGT])\)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class UnavailableError(RuntimeError):
    """The compiler for a platform is not installed, or not the one that jax asks for; the message names the extra."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one program takes, on each device.

    Attributes:
      peak: bytes, arguments and results included; where the compiler refused, what it says that it would need.
      refused: whether the compiler found that it does not fit.
      arguments, results, aliased: bytes; `aliased` of the results reuse the memory of donated arguments.
      collectives, kernels, largest_array, host_calls: see `hlo`.
      seconds: that lowering and compiling took.
    """

    peak: int
    refused: bool = False
    arguments: int = 0
    results: int = 0
    aliased: int = 0
    collectives: tuple[hlo.Collective, ...] = ()
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    largest_array: str = ""
    host_calls: tuple[str, ...] = ()
    seconds: float = 0.0


def devices(target: Target) -> Sequence[jax.Device]:
    """Devices of a machine that is not there: they can be compiled for.

    Raises:
      UnavailableError: libtpu, or JAX's CUDA plugin, is not installed.
    """
    chip = target.chip
    if chip.platform == "tpu":
        options: dict = {
            "topology_name": target.topology,
            "num_slices": target.slices,
            "chips_per_host_bounds": target.host_bounds,
        }
        if chip.chip_config is not None:
            options["chip_config_name"] = chip.chip_config
        extra, needs = "plan", "libtpu"
    else:
        options = {"topology": target.topology, "target_config": chip.config}
        extra, needs = "plan-gpu", "JAX's CUDA plugin"
    try:
        description = topologies.get_topology_desc(platform=chip.platform, **options)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise UnavailableError(
            f"compiling for {target.name} needs {needs}: pip install 'gvjax[{extra}]' (it runs without the device); "
            f"JAX says: {str(error).splitlines()[0]}"
        ) from None
    return description.devices


class Compiler:
    """Compiles programs, each once."""

    def __init__(self, mesh: jax.sharding.Mesh, watch: Callable[[str], None]):
        """Args:
        mesh: whose axes collectives are named by.
        watch: told the name of every program before it is compiled.
        """
        self._mesh = mesh
        self._watch = watch
        self._done: dict[Hashable, Compiled] = {}

    def __call__(self, program: Program) -> Compiled:
        if program.key not in self._done:
            self._watch(program.name)
            self._done[program.key] = _compile(program, self._mesh)
        return self._done[program.key]


def _text(compiled: jax.stages.Compiled) -> str:
    try:
        return compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        raise UnavailableError(
            f"jaxlib {jaxlib.version.__version__} cannot read what the compiler wrote, which is of another version: "
            "pip install 'gvjax[plan]' brings the libtpu that this jax asks for, 'gvjax[plan-gpu]' its CUDA plugin; "
            f"JAX says: {str(error).splitlines()[0]}"
        ) from None


def _compile(program: Program, mesh: jax.sharding.Mesh) -> Compiled:
    begun = time.monotonic()
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        found = _OUT_OF_MEMORY.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or found is None:
            raise
        peak = int(float(found.group(1)) * _UNITS[found.group(2)])
        return Compiled(peak, refused=True, seconds=time.monotonic() - begun)
    memory: Any = compiled.memory_analysis()
    text = _text(compiled)
    return Compiled(
        # Not arguments + temporaries: that counts donated memory twice.
        peak=memory.peak_memory_in_bytes,
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        collectives=tuple(hlo.collectives(text, dict(mesh.shape))),
        kernels=hlo.kernels(text),
        largest_array=hlo.largest_array(text),
        host_calls=tuple(hlo.host_calls(text)),
        seconds=time.monotonic() - begun,
    )

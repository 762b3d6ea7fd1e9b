"""What is done one way on one platform and another way on others, each as it was measured to be fastest, in one place.

No choice changes a number by more than rounding. The kernels of attention are chosen by more than the platform, in
`attention.choose_kernel`; how the process itself is set up for a CPU is said in `gvjax.runtime`. The draw of a token and the
layout of the cache are the same everywhere.
"""

import dataclasses

from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class Traits:
    """How a platform runs a decoder best.

    Attributes:
      unrolled_layers: networks that are no deeper run unrolled where the config leaves it open; deeper ones are a scan,
        which compiles faster.
      trims: sequences are run no further than somebody asks: not their last token, of prompts only what completions
        read in the last layer, no logits of what is not scored. Elsewhere whole sequences, whose lengths are powers of
        two, suit the kernels better.
      arranges: queries, keys and values are one product, and gradients of kernels that are taller than wide come out
        turned; see `transformer`.
      settles_tables: the angles of rotary embeddings are computed once, and not for every head that reads them.
      keeps_scores_cached: attention runs over a few sequences and heads at a time, whose scores stay in the cache.
      shares_prompts: completions of one prompt are trained on with the prompt run once.
    """

    unrolled_layers: int
    trims: bool
    arranges: bool
    settles_tables: bool
    keeps_scores_cached: bool
    shares_prompts: bool


_CPU = Traits(
    unrolled_layers=32,
    trims=True,
    arranges=True,
    settles_tables=True,
    keeps_scores_cached=True,
    shares_prompts=True,
)

# Expected, not measured.
_ACCELERATOR = Traits(
    unrolled_layers=8,
    trims=False,
    arranges=False,
    settles_tables=False,
    keeps_scores_cached=False,
    shares_prompts=False,
)


def traits(platform: str | None) -> Traits:
    """Those of "cpu", "gpu" or "tpu"; None is a CPU."""
    return _CPU if platform in (None, "cpu") else _ACCELERATOR


def name_of(mesh: Mesh | None, platform: str | None) -> str | None:
    """What a program runs on: what is said, else the mesh's platform, else None.

    Never the process' default backend: a program that is compiled ahead of time for a TPU is traced on a CPU.
    """
    if platform is None and mesh is not None:
        return mesh.devices.flat[0].platform
    return platform

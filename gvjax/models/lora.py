"""Low-rank adapters: a few trained numbers beside frozen parameters, which remain the reference policy.

    y = x W + (α / r) (x A) B        A [in, r] random, B [r, out] zero at the start

What is trained is `{"base": params, "lora": adapters}`. Without its adapters the policy is the reference: there is no
second copy of the weights, and the reference cannot drift along with the policy.

    params = lora.adapted(params, lora.init(key, params, config))
    step = make_dpo_step(lora.adapter_logps_fn(logps_fn, config), lora.adapters_only(tx))
    batch = with_ref_logps(logps_fn, state.params["base"], batch)

References:
  Hu et al., 2021, https://arxiv.org/abs/2106.09685, Eq. 3.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from gvjax.models import transformer
from gvjax.types import LogpsFn, Params

PARTITION_RULES = (
    *transformer.PARTITION_RULES,
    (r"(query|key|value|gate|up)/lora_a", P(None, "fsdp", None)),
    (r"(query|key|value|gate|up)/lora_b", P(None, None, "tensor")),
    (r"(output|down)/lora_a", P(None, "tensor", None)),
    (r"(output|down)/lora_b", P(None, None, "fsdp")),
)
"""The decoder's, and the adapters': the rank is never split."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which layers get an adapter, and how large.

    Attributes:
      rank: r >= 1; 8 to 64 are usual.
      alpha: α > 0; adapters count α / r times. Changing it is much like changing the learning rate.
      targets: regex that a linear layer's path must match whole, such as "attention/(query|value)"; by default all of
        attention and MLP.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str = r"(attention|mlp)/.*"

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; it must be at least 1")
        if self.alpha <= 0:
            raise ValueError(f"alpha is {self.alpha}; it must be positive")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(
                f"targets {self.targets!r} is no regular expression: {error}"
            ) from None

    @property
    def scale(self) -> float:
        """α / r."""
        return self.alpha / self.rank


def init(key: jax.Array, params: Params, config: LoraConfig) -> Params:
    """Adapters for every layer that `targets` names.

    A is uniform in ±1/√in, as in the authors' code; B is 0, so that the policy starts as it was.

    Args:
      key: consumed.
      params: a decoder's parameters, or their shapes.
      config: LoraConfig.

    Returns:
      Nested dict of f32 arrays, `layers/<target>/lora_a [L, in, r]` and `lora_b [L, r, out]`.

    Raises:
      ValueError: no layer is named, or the rank is larger than a layer.
    """
    kernels = {
        f"{group}/{name}": part["kernel"].shape
        for group in ("attention", "mlp")
        for name, part in params["layers"][group].items()
        if "kernel" in part
    }
    chosen = [path for path in kernels if re.fullmatch(config.targets, path)]
    if not chosen:
        raise ValueError(
            f"targets {config.targets!r} matches no layer; there are: {', '.join(kernels)}"
        )
    adapters: dict[str, Any] = {}
    for path, path_key in zip(chosen, jax.random.split(key, len(chosen))):
        layers, inputs, outputs = kernels[path]
        if config.rank > min(inputs, outputs):
            raise ValueError(
                f"rank {config.rank} is larger than {path}, of {inputs} by {outputs}; take a smaller one, or leave the "
                "layer out of targets"
            )
        bound = inputs**-0.5
        group, name = path.split("/")
        shape = (layers, inputs, config.rank)
        adapters.setdefault(group, {})[name] = {
            "lora_a": jax.random.uniform(path_key, shape, minval=-bound, maxval=bound),
            "lora_b": jnp.zeros((layers, config.rank, outputs)),
        }
    return {"layers": adapters}


def adapted(params: Params, adapters: Params) -> Params:
    """`{"base": params, "lora": adapters}`: what is trained with `adapter_logps_fn` and `adapters_only`."""
    return {"base": params, "lora": adapters}


def apply(params: Params, adapters: Params, config: LoraConfig) -> Params:
    """Parameters with adapters on: each kernel keeps its own array and gets lora_a and lora_b beside it.

    Every function of `transformer` takes the result. Nothing of the size of a kernel is made, forward or backward.
    """
    return _combined(
        params,
        adapters,
        lambda part, a, b: {**part, "lora_a": a, "lora_b": config.scale * b},
    )


def merge(params: Params, adapters: Params, config: LoraConfig) -> Params:
    """Plain parameters, W + (α / r) A B: for export, and for decoding at no extra cost."""

    def merged(part, a, b):
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return {**part, "kernel": part["kernel"] + config.scale * product}

    return _combined(params, adapters, merged)


def adapter_logps_fn(logps_fn: LogpsFn, config: LoraConfig) -> LogpsFn:
    """A LogpsFn of `{"base": ..., "lora": ...}` that has a gradient to the adapters only."""

    # What more it takes (`segments`, `scored`) is what the model takes.
    @functools.wraps(logps_fn)
    def adapter_logps(params, tokens, *rest, **more):
        base = jax.lax.stop_gradient(params["base"])
        return logps_fn(apply(base, params["lora"], config), tokens, *rest, **more)

    return adapter_logps


def adapters_only(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` for the adapters of `{"base": ..., "lora": ...}`, and no update, nor optimizer state, for the base.

    Without it a transform with weight decay would shrink the frozen parameters too.
    """
    labels = {"base": "frozen", "lora": "trained"}
    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)


def _combined(params: Params, adapters: Params, combine) -> Params:
    layers = dict(params["layers"])
    for group, parts in adapters["layers"].items():
        layers[group] = dict(layers[group])
        for name, adapter in parts.items():
            part = layers[group][name]
            layers[group][name] = combine(part, adapter["lora_a"], adapter["lora_b"])
    return {**params, "layers": layers}

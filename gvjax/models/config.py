"""The shape of a decoder, and how it is computed."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax

from gvjax.models.attention import AttentionConfig

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
_DTYPES = ("float32", "bfloat16")
REMAT = ("none", "dots", "full")
"""What the backward pass may recompute, from nothing to all: less memory, and more time, each."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder. Hashable: pass it as a static argument or close over it.

    The defaults are a small Llama: pre-norm RMSNorm, full rotary embeddings, gated SiLU, no biases, tied embeddings.

    Attributes:
      vocab_size: V.
      embed_dim: D.
      num_layers: L.
      num_heads: H, query heads.
      mlp_dim: width inside the MLP.
      num_kv_heads: K, key and value heads; H is a multiple of it; None is H. Fewer make decoding's cache smaller.
      head_dim: hd; None is D / H.
      norm: "rms", or "layer" (mean removed, with a bias).
      norm_epsilon: added to the variance.
      norm_plus_one: scales are stored as their difference from 1 (Gemma).
      post_norms: norm the outputs of attention and MLP too, before they are added (Gemma).
      qk_norm: RMSNorm over each query and key head (Qwen3, Gemma 3).
      learned_positions: None for rotary embeddings; a number for that many learned position vectors, added to the
        token embeddings (GPT-2): no sequence may then be longer. Small networks tell prompt from completion with them.
      rope_theta: base of the rotary wavelengths; larger suits longer sequences.
      rope_fraction: share of each head that is rotated, in (0, 1] (GPT-NeoX: 0.25).
      rope_scale: positions are divided by it in layers that see everything (Gemma 3 from 4B on: 8).
      rope_llama3: (factor, low, high, length), as Llama 3.1 stretches its positions: wavelengths over length / low are
        multiplied by factor, those under length / high are left, and those between go smoothly from one to the other.
      sliding_window: tokens a local layer sees, itself included; None: every layer sees everything.
      global_every: with a window, layer i sees everything where (i + 1) % global_every == 0; 0: nowhere.
      local_rope_theta: rope_theta of local layers; None is the same.
      mlp_gated: activation(gate) · up, else activation(up).
      activation: "silu", "gelu", "gelu_tanh" or "relu".
      qkv_bias, output_bias, mlp_bias: biases of query, key and value; of attention's output; of the MLP.
      parallel_residual: attention and MLP both read the layer's input (GPT-NeoX).
      tied_embeddings: logits are read with the embedding matrix.
      scale_embedding: embeddings are multiplied by √D (Gemma).
      query_scale: what attention scores are multiplied by; None is 1/√hd.
      attention_softcap, logit_softcap: x becomes cap · tanh(x / cap) (Gemma 2); None: no cap.
      dtype: what activations and matrix products are computed in, "float32" or "bfloat16". Parameters, norms, softmax
        and log-probabilities are float32 always.
      remat: what the backward pass recomputes: "none", "dots" (all but matrix products) or "full" (everything but the
        layers' inputs). Each costs time and saves memory.
      scan_layers: run the layers as one scan, which compiles in a time that does not grow with L; None: see `scans`.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = 1e-6
    norm_plus_one: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    learned_positions: int | None = None
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0
    rope_scale: float = 1.0
    rope_llama3: tuple[float, float, float, int] | None = None
    sliding_window: int | None = None
    global_every: int = 0
    local_rope_theta: float | None = None
    mlp_gated: bool = True
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    parallel_residual: bool = False
    tied_embeddings: bool = True
    scale_embedding: bool = False
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    scan_layers: bool | None = None

    def __post_init__(self):
        sizes = ("vocab_size", "embed_dim", "num_layers", "num_heads", "mlp_dim")
        optional = (
            "num_kv_heads",
            "head_dim",
            "sliding_window",
            "learned_positions",
        )
        for name in (*sizes, *optional):
            value = getattr(self, name)
            if (value is None and name in sizes) or (value is not None and value < 1):
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}; change one, or set head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.kv_heads}; each key head serves the "
                "same number of query heads"
            )
        if not 0 < self.rope_fraction <= 1 or self.rotary_dim < 2:
            raise ValueError(
                f"rope_fraction {self.rope_fraction} rotates {self.rotary_dim} of {self.width} head dimensions; it must "
                "lie in (0, 1] and leave at least one pair"
            )
        if self.rotary_dim % 2:
            raise ValueError(
                f"rope_fraction {self.rope_fraction} of head_dim {self.width} is {self.rotary_dim} dimensions; pairs "
                "are rotated, so it must be even"
            )
        for name in (
            "norm_epsilon",
            "rope_theta",
            "rope_scale",
            "local_rope_theta",
            "query_scale",
            "attention_softcap",
            "logit_softcap",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        if self.learned_positions is not None:
            for name in ("rope_theta", "rope_fraction", "rope_scale", "rope_llama3"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(
                        f"{name} is {getattr(self, name)} but positions are learned and nothing is rotated; leave one "
                        "of the two out"
                    )
        if self.rope_llama3 is not None:
            factor, low, high, length = self.rope_llama3
            if not (factor > 0 and 0 < low < high and length > 0):
                raise ValueError(
                    f"rope_llama3 is {self.rope_llama3}; it must be (factor, low, high, length), all positive and low "
                    "below high"
                )
        if self.global_every < 0:
            raise ValueError(f"global_every is {self.global_every}; it must be >= 0")
        if self.sliding_window is None:
            for name, unset in (("global_every", 0), ("local_rope_theta", None)):
                if getattr(self, name) != unset:
                    raise ValueError(
                        f"{name} is {getattr(self, name)} but no layer is local; set sliding_window, or leave {name} out"
                    )
        for name, allowed in (
            ("norm", ("rms", "layer")),
            ("activation", tuple(ACTIVATIONS)),
            ("dtype", _DTYPES),
            ("remat", REMAT),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}"
                )

    @property
    def kv_heads(self) -> int:
        """K, resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def width(self) -> int:
        """hd, resolved."""
        return self.head_dim or self.embed_dim // self.num_heads

    @property
    def rotary_dim(self) -> int:
        """How many of the hd dimensions are rotated."""
        return int(self.width * self.rope_fraction)

    @property
    def period(self) -> int:
        """After how many layers the pattern of local and global layers repeats."""
        return self.global_every if self.sliding_window and self.global_every else 1

    def is_local(self, layer: int) -> bool:
        """Whether a layer sees the sliding window only."""
        if self.sliding_window is None:
            return False
        return self.global_every == 0 or (layer + 1) % self.global_every != 0

    def attention(self, layer: int) -> AttentionConfig:
        """What attention needs to know of a layer."""
        return AttentionConfig(
            scale=self.query_scale or self.width**-0.5,
            window=self.sliding_window if self.is_local(layer) else None,
            softcap=self.attention_softcap,
        )

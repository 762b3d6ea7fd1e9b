"""Networks by name, with random weights: what is benchmarked and planned for without a download."""

import dataclasses
from types import MappingProxyType

from gvjax.models.config import ModelConfig

TINY = ModelConfig(
    vocab_size=512,
    embed_dim=128,
    num_layers=4,
    num_heads=4,
    mlp_dim=512,
    norm_epsilon=1e-5,
)

LLAMA_30M = ModelConfig(
    vocab_size=8192,
    embed_dim=512,
    num_layers=8,
    num_heads=8,
    mlp_dim=1376,
    norm_epsilon=1e-5,
)

SMOLLM2_135M = ModelConfig(
    vocab_size=49152,
    embed_dim=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    mlp_dim=1536,
    norm_epsilon=1e-5,
    rope_theta=100_000.0,
)
"""https://huggingface.co/HuggingFaceTB/SmolLM2-135M"""

PYTHIA_1_4B = ModelConfig(
    vocab_size=50304,
    embed_dim=2048,
    num_layers=24,
    num_heads=16,
    mlp_dim=8192,
    norm="layer",
    norm_epsilon=1e-5,
    rope_fraction=0.25,
    mlp_gated=False,
    activation="gelu",
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    parallel_residual=True,
    tied_embeddings=False,
)
"""https://huggingface.co/EleutherAI/pythia-1.4b"""

PYTHIA_2_8B = dataclasses.replace(
    PYTHIA_1_4B, embed_dim=2560, num_layers=32, num_heads=32, mlp_dim=10240
)
"""https://huggingface.co/EleutherAI/pythia-2.8b"""

LLAMA_8B = ModelConfig(
    vocab_size=128256,
    embed_dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    mlp_dim=14336,
    norm_epsilon=1e-5,
    rope_theta=500_000.0,
    rope_llama3=(8.0, 1.0, 4.0, 8192),
    tied_embeddings=False,
)
"""https://huggingface.co/meta-llama/Llama-3.1-8B"""

SHAPES = MappingProxyType(
    {
        "tiny": TINY,
        "llama-30m": LLAMA_30M,
        "smollm2-135m": SMOLLM2_135M,
        "pythia-1.4b": PYTHIA_1_4B,
        "pythia-2.8b": PYTHIA_2_8B,
        "llama-8b": LLAMA_8B,
    }
)


def shape(name: str, **runtime: str | bool | None) -> ModelConfig:
    """A named network; `runtime` sets dtype, remat and scan_layers.

    Raises:
      ValueError: there is no such name.
    """
    if name not in SHAPES:
        raise ValueError(f"there is no shape {name!r}; use one of {', '.join(SHAPES)}")
    return dataclasses.replace(SHAPES[name], **runtime)  # type: ignore[arg-type]

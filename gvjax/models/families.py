"""The model families of Hugging Face as tables: switches of `ModelConfig` for config.json, tensor names for our paths.

A family says three things: which switches all its models share, which key of config.json holds each of the others, and
what its tensors are called. Reading and writing go through the same table, so what is read can be written. Keys of
transformers 4.x (`rope_theta`, `rope_scaling`, `rotary_pct`, `sliding_window_pattern`, `torch_dtype`) and of 5.x
(`rope_parameters`, `layer_types`, `dtype`) are both read; the former are written, which both versions read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from gvjax.models.config import ModelConfig

Json = Any
"""What `json.loads` returns."""

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
_ACTIVATION_NAMES = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}
RUNTIME = ("dtype", "remat", "scan_layers")
"""Fields of ModelConfig that say how it is run, not what it computes: no file holds them."""
_WINDOWED = ("qwen", "gemma")
"""How the model types begin that have a sliding window; the others have none, whatever else stands in the file."""


class Source(NamedTuple):
    """Where the numbers of one of our arrays are.

    Attributes:
      name: of the tensor, with {layer} where there is one for each layer.
      part: which of the three parts of a fused query_key_value tensor; None for a tensor of its own.
    """

    name: str
    part: int | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type` of transformers.

    Attributes:
      classes: the architecture's name before `ForCausalLM` and before `ForSequenceClassification`.
      fixed: the switches that all models of the family share.
      keys: key of config.json for the fields that are its own; several fields may share one.
      defaults: what transformers takes for keys that config.json leaves out.
      names: `Source` of each of our paths, without `.weight` and `.bias`.
    """

    classes: tuple[str, str]
    fixed: Mapping[str, Any]
    keys: Mapping[str, str]
    defaults: Mapping[str, Json]
    names: Mapping[str, Source]


_SIZES = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "tied_embeddings": "tie_word_embeddings",
}
_LLAMA_KEYS = {
    **_SIZES,
    "num_kv_heads": "num_key_value_heads",
    "norm_epsilon": "rms_norm_eps",
    "activation": "hidden_act",
}
_GEMMA_KEYS = {
    **_LLAMA_KEYS,
    "activation": "hidden_activation",
    "head_dim": "head_dim",
    "query_scale": "query_pre_attn_scalar",
    "qkv_bias": "attention_bias",
    "output_bias": "attention_bias",
    "logit_softcap": "final_logit_softcapping",
}
_LLAMA_DEFAULTS = {
    "tie_word_embeddings": False,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 10_000.0,
}
_GEMMA_DEFAULTS = {
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "rope_theta": 10_000.0,
}
_LLAMA_NAMES = {
    "embed": Source("model.embed_tokens"),
    "final_norm": Source("model.norm"),
    "unembed": Source("lm_head"),
    "layers/attention_norm": Source("model.layers.{layer}.input_layernorm"),
    "layers/attention/query": Source("model.layers.{layer}.self_attn.q_proj"),
    "layers/attention/key": Source("model.layers.{layer}.self_attn.k_proj"),
    "layers/attention/value": Source("model.layers.{layer}.self_attn.v_proj"),
    "layers/attention/output": Source("model.layers.{layer}.self_attn.o_proj"),
    "layers/attention/query_norm": Source("model.layers.{layer}.self_attn.q_norm"),
    "layers/attention/key_norm": Source("model.layers.{layer}.self_attn.k_norm"),
    "layers/mlp_norm": Source("model.layers.{layer}.post_attention_layernorm"),
    "layers/mlp/gate": Source("model.layers.{layer}.mlp.gate_proj"),
    "layers/mlp/up": Source("model.layers.{layer}.mlp.up_proj"),
    "layers/mlp/down": Source("model.layers.{layer}.mlp.down_proj"),
}
_GEMMA_NAMES = {
    **_LLAMA_NAMES,
    "layers/attention_post_norm": Source(
        "model.layers.{layer}.post_attention_layernorm"
    ),
    "layers/mlp_norm": Source("model.layers.{layer}.pre_feedforward_layernorm"),
    "layers/mlp_post_norm": Source("model.layers.{layer}.post_feedforward_layernorm"),
}
_GEMMA_FIXED = {"norm_plus_one": True, "post_norms": True, "scale_embedding": True}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        classes=("Llama", "Llama"),
        fixed={},
        keys={
            **_LLAMA_KEYS,
            "head_dim": "head_dim",
            "qkv_bias": "attention_bias",
            "output_bias": "attention_bias",
            "mlp_bias": "mlp_bias",
        },
        defaults={
            **_LLAMA_DEFAULTS,
            "head_dim": None,
            "attention_bias": False,
            "mlp_bias": False,
        },
        names=_LLAMA_NAMES,
    ),
    "qwen2": Family(
        classes=("Qwen2", "Qwen2"),
        fixed={"qkv_bias": True},
        keys=_LLAMA_KEYS,
        defaults=_LLAMA_DEFAULTS,
        names=_LLAMA_NAMES,
    ),
    "qwen3": Family(
        classes=("Qwen3", "Qwen3"),
        fixed={"qk_norm": True},
        keys={
            **_LLAMA_KEYS,
            "head_dim": "head_dim",
            "qkv_bias": "attention_bias",
            "output_bias": "attention_bias",
        },
        defaults={**_LLAMA_DEFAULTS, "head_dim": 128, "attention_bias": False},
        names=_LLAMA_NAMES,
    ),
    "gemma2": Family(
        classes=("Gemma2", "Gemma2"),
        fixed=_GEMMA_FIXED,
        keys={**_GEMMA_KEYS, "attention_softcap": "attn_logit_softcapping"},
        defaults={
            **_GEMMA_DEFAULTS,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 2,
        },
        names=_GEMMA_NAMES,
    ),
    "gemma3_text": Family(
        classes=("Gemma3", "Gemma3Text"),
        fixed={**_GEMMA_FIXED, "qk_norm": True},
        keys=_GEMMA_KEYS,
        defaults={
            **_GEMMA_DEFAULTS,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "final_logit_softcapping": None,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        names=_GEMMA_NAMES,
    ),
    "gpt_neox": Family(
        classes=("GPTNeoX", "GPTNeoX"),
        fixed={"norm": "layer", "mlp_gated": False, "mlp_bias": True},
        keys={
            **_SIZES,
            "norm_epsilon": "layer_norm_eps",
            "activation": "hidden_act",
            "parallel_residual": "use_parallel_residual",
            "qkv_bias": "attention_bias",
            "output_bias": "attention_bias",
        },
        defaults={
            "tie_word_embeddings": False,
            "layer_norm_eps": 1e-5,
            "hidden_act": "gelu",
            "use_parallel_residual": True,
            "attention_bias": True,
            "rotary_pct": 0.25,
            "rotary_emb_base": 10_000.0,
        },
        names={
            "embed": Source("gpt_neox.embed_in"),
            "final_norm": Source("gpt_neox.final_layer_norm"),
            "unembed": Source("embed_out"),
            "layers/attention_norm": Source("gpt_neox.layers.{layer}.input_layernorm"),
            "layers/mlp_norm": Source(
                "gpt_neox.layers.{layer}.post_attention_layernorm"
            ),
            **{
                f"layers/attention/{name}": Source(
                    "gpt_neox.layers.{layer}.attention.query_key_value", part
                )
                for part, name in enumerate(("query", "key", "value"))
            },
            "layers/attention/output": Source(
                "gpt_neox.layers.{layer}.attention.dense"
            ),
            "layers/mlp/up": Source("gpt_neox.layers.{layer}.mlp.dense_h_to_4h"),
            "layers/mlp/down": Source("gpt_neox.layers.{layer}.mlp.dense_4h_to_h"),
        },
    ),
}
"""By `model_type`; where two families can express a model, the earlier is taken."""


def family_of(hf_config: Mapping[str, Json]) -> Family:
    """The family that config.json names; ValueError where it is not one of ours."""
    model_type = hf_config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type is {model_type!r} (architectures {hf_config.get('architectures')}), which is not supported; "
            f"these are: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def source(family: Family, path: str) -> Source:
    """Which tensor one of our arrays comes from; the path as in `transformer`'s docstring, such as layers/mlp/up/kernel."""
    stem, _, leaf = path.rpartition("/")
    found = family.names[stem]
    return found._replace(name=f"{found.name}.{'bias' if leaf == 'bias' else 'weight'}")


def model_config(hf_config: Mapping[str, Json], **runtime: Any) -> ModelConfig:
    """The ModelConfig of a config.json.

    Args:
      hf_config: the parsed file.
      runtime: `dtype`, `remat` and `scan_layers`, which no file holds.

    Raises:
      ValueError: naming what is missing, or what this decoder cannot compute.
    """
    family = family_of(hf_config)
    given = {**family.defaults, **hf_config}
    missing = sorted(key for key in family.keys.values() if key not in given)
    if missing:
        raise ValueError(
            f"config.json of a {hf_config['model_type']} lacks {', '.join(missing)}"
        )
    if given.get("use_bidirectional_attention"):
        raise ValueError(
            "use_bidirectional_attention is true; this decoder is causal, so it would compute something else"
        )
    softcap = given.get("attn_logit_softcapping")
    if softcap is not None and "attention_softcap" not in family.keys:
        raise ValueError(
            f"attn_logit_softcapping is {softcap}, which transformers ignores in a {given['model_type']}; set it to null "
            "in config.json if the model was trained without"
        )
    settings = {field: given[key] for field, key in family.keys.items()}
    if settings["activation"] not in _ACTIVATIONS:
        raise ValueError(
            f"{family.keys['activation']} is {settings['activation']!r}, which is not supported; these are: "
            f"{', '.join(_ACTIVATIONS)}"
        )
    settings["activation"] = _ACTIVATIONS[settings["activation"]]
    if settings.get("query_scale") is not None:
        settings["query_scale"] = settings["query_scale"] ** -0.5
    pattern = _window(given)
    return ModelConfig(
        **family.fixed,
        **settings,
        **pattern,
        **_rope(given, local="sliding_window" in pattern),
        **runtime,
    )


def hf_config(config: ModelConfig) -> dict[str, Json]:
    """The config.json of a ModelConfig: its architecture only, without `architectures`, dtype and token ids.

    The first family that can express it is taken.

    Raises:
      ValueError: no family can; the fields that stand in the way of the closest one are named.
    """
    obstacles = {}
    for model_type, family in FAMILIES.items():
        written = _written(config, model_type, family)
        want, got = _meaning(config), _meaning(model_config(written))
        different = [name for name in want if want[name] != got[name]]
        if not different:
            return written
        obstacles[model_type] = different
    closest = min(obstacles, key=lambda model_type: len(obstacles[model_type]))
    raise ValueError(
        f"no family of transformers computes this model; {closest} comes closest, but not with "
        + ", ".join(f"{name}={_meaning(config)[name]!r}" for name in obstacles[closest])
    )


def _written(config: ModelConfig, model_type: str, family: Family) -> dict[str, Json]:
    settings = {
        **dataclasses.asdict(config),
        "num_kv_heads": config.kv_heads,
        "head_dim": config.width,
        "activation": _ACTIVATION_NAMES[config.activation],
        "query_scale": _integral((config.query_scale or config.width**-0.5) ** -2),
    }
    written: dict[str, Json] = {"model_type": model_type}
    written |= {key: settings[field] for field, key in family.keys.items()}
    scaling: dict[str, Json] | None = None
    if config.rope_llama3 is not None:
        factor, low, high, length = config.rope_llama3
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": length,
        }
    elif config.rope_scale != 1:
        scaling = {"rope_type": "linear", "factor": config.rope_scale}
    if scaling is not None:
        written["rope_scaling"] = scaling
    if model_type == "gpt_neox":
        written["rotary_emb_base"] = config.rope_theta
        written["rotary_pct"] = config.rope_fraction
        return written
    written["rope_theta"] = config.rope_theta
    if not model_type.startswith(_WINDOWED):
        return written
    if config.sliding_window is not None:
        written["sliding_window"] = config.sliding_window
        written["layer_types"] = [
            "sliding_attention" if config.is_local(layer) else "full_attention"
            for layer in range(config.num_layers)
        ]
        if model_type.startswith("qwen"):
            # Its readers drop the window unless they are told to use it.
            written |= {"use_sliding_window": True, "max_window_layers": 0}
    elif model_type.startswith("gemma"):
        written["layer_types"] = ["full_attention"] * config.num_layers
    if model_type == "gemma3_text":
        written["rope_local_base_freq"] = config.local_rope_theta or config.rope_theta
        if config.global_every:
            written["sliding_window_pattern"] = config.global_every
    return written


def _integral(value: float) -> int | float:
    """A number that was a whole one before it was rooted and squared."""
    return round(value) if abs(value - round(value)) < 1e-6 * value else value


def _meaning(config: ModelConfig) -> dict[str, Any]:
    """What a config computes: fields, with those that are implied written out, and local layers one by one."""
    fields = dataclasses.asdict(config)
    windowed = any(config.is_local(layer) for layer in range(config.num_layers))
    fields |= {
        "num_kv_heads": config.kv_heads,
        "head_dim": config.width,
        "query_scale": config.query_scale or config.width**-0.5,
        "sliding_window": config.sliding_window if windowed else None,
        "global_every": [config.is_local(layer) for layer in range(config.num_layers)],
        "local_rope_theta": (config.local_rope_theta or config.rope_theta)
        if windowed
        else None,
    }
    return {name: value for name, value in fields.items() if name not in RUNTIME}


def _window(given: Mapping[str, Json]) -> dict[str, Any]:
    """sliding_window and global_every, from layer_types or from what older files say instead."""
    window, layers = given.get("sliding_window"), given["num_hidden_layers"]
    model_type = given["model_type"]
    is_qwen = model_type.startswith("qwen")
    if window is None or not model_type.startswith(_WINDOWED):
        return {}
    if is_qwen and not given.get("use_sliding_window"):
        return {}
    types = given.get("layer_types")
    if types is None and is_qwen:
        first = given.get("max_window_layers", 28)
        local = [layer >= first for layer in range(layers)]
    elif types is None:
        every = given["sliding_window_pattern"]
        local = [(layer + 1) % every != 0 for layer in range(layers)]
    else:
        unknown = set(types) - {"sliding_attention", "full_attention"}
        if unknown or len(types) != layers:
            raise ValueError(
                f"layer_types is {types}; it must hold one of sliding_attention, full_attention for each of the "
                f"{layers} layers"
            )
        local = [each == "sliding_attention" for each in types]
    if not any(local):
        return {}
    every = 0 if all(local) else local.index(False) + 1
    if local != [every == 0 or (layer + 1) % every != 0 for layer in range(layers)]:
        raise ValueError(
            f"the sliding window is on layers {[i for i, each in enumerate(local) if each]} of {layers}; supported are "
            "all layers, and all but every n-th"
        )
    return {"sliding_window": window, "global_every": every}


def _rope(given: Mapping[str, Json], *, local: bool) -> dict[str, Any]:
    """The rope_* fields: rope_parameters (5.x), rope_scaling beside rope_theta or rotary_* (4.x)."""
    theta = given.get("rotary_emb_base", given.get("rope_theta"))
    rope = {
        "rope_theta": theta,
        "partial_rotary_factor": given.get(
            "rotary_pct", given.get("partial_rotary_factor", 1.0)
        ),
        "rope_local_base_freq": given.get("rope_local_base_freq"),
    }
    parameters = given.get("rope_parameters") or {}
    if "full_attention" in parameters:
        sliding = parameters.get("sliding_attention") or {}
        if sliding.get("rope_type", "default") != "default":
            raise ValueError(
                f"rope_parameters of sliding_attention is {sliding}; local layers support rope_type default only"
            )
        if "rope_theta" in sliding:
            rope["rope_local_base_freq"] = sliding["rope_theta"]
        parameters = parameters["full_attention"]
    rope |= {**parameters, **(given.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    fields: dict[str, Any] = {
        "rope_theta": float(rope["rope_theta"]),
        "rope_fraction": float(rope["partial_rotary_factor"]),
    }
    if local and rope["rope_local_base_freq"] is not None:
        fields["local_rope_theta"] = float(rope["rope_local_base_freq"])
    if kind == "linear":
        fields["rope_scale"] = float(rope["factor"])
    elif kind == "llama3":
        fields["rope_llama3"] = (
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    elif kind != "default":
        raise ValueError(
            f"rope scaling {kind!r} is not supported; these are: default, linear, llama3"
        )
    return fields

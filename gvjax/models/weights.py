"""Tensors by name out of files: safetensors, memory-mapped, and GGUF, brought to the names and layout of transformers."""

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors

from gvjax.models.families import Json

BUFFERS = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")
"""Endings of tensors that older files hold and nothing reads."""


class Weights(Protocol):
    """Tensors by name: their shapes, and a part of one as float32[rows(, columns)]."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray: ...


class Safetensors:
    def __init__(self, directory: Path):
        index, single = (
            directory / "model.safetensors.index.json",
            directory / "model.safetensors",
        )
        if index.exists():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        elif single.exists():
            files = [single.name]
        else:
            pickles = sorted(
                file.name
                for file in directory.glob("*")
                if file.suffix in (".bin", ".pt", ".pth", ".ckpt")
            )
            held = (
                f"only {', '.join(pickles)}, and pickles, which can run code, are not read"
                if pickles
                else "no weights"
            )
            raise ValueError(
                f"{directory} holds {held}; it must hold model.safetensors, or several files under "
                f"model.safetensors.index.json (transformers' save_pretrained writes them)"
            )
        self._slices = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in files:
            if Path(name).name != name or not (directory / name).exists():
                raise ValueError(
                    f"{index} names {name}, which {directory} does not hold"
                )
            file = safetensors.safe_open(directory / name, framework="numpy")
            for tensor in file.keys():  # noqa: SIM118 (it is no dict)
                part = file.get_slice(tensor)
                if part.get_dtype() not in ("F32", "F16", "BF16", "F64") and not (
                    tensor.endswith(BUFFERS)
                ):
                    raise ValueError(
                        f"{tensor} is of dtype {part.get_dtype()}; quantised checkpoints are not supported, only F32, "
                        "F16 and BF16"
                    )
                self._slices[tensor] = part
                self.shapes[tensor] = tuple(part.get_shape())

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self._slices[name][index].astype(np.float32)


class Gguf:
    """A GGUF file of the llama architecture, under the names and in the layout of transformers."""

    NAMES: Mapping[str, str] = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }

    def __init__(self, path: Path):
        self._gguf, reader, key = _open_gguf(path)
        architecture = key("general.architecture")
        if architecture != "llama":
            raise ValueError(
                f"{path} is of the architecture {architecture!r}; of GGUF files only llama is supported, for others give "
                "the model's safetensors"
            )
        self._tensors = {self._name(each.name): each for each in reader.tensors}
        self.shapes = {
            # GGUF writes dimensions fastest first.
            name: tuple(int(size) for size in reversed(each.shape))
            for name, each in self._tensors.items()
        }
        heads = key("llama.attention.head_count")
        width = key("llama.embedding_length")
        head_dim = key("llama.attention.key_length", width // heads)
        for name, allowed in (
            ("llama.rope.scaling.type", (None, "none")),
            ("llama.expert_count", (None, 0)),
            ("llama.rope.dimension_count", (None, head_dim)),
            ("llama.attention.sliding_window", (None, 0)),
        ):
            if key(name) not in allowed:
                raise ValueError(
                    f"{path} sets {name} to {key(name)!r}, which is not supported; give the model's safetensors"
                )
        self._heads = {
            "q_proj": heads,
            "k_proj": key("llama.attention.head_count_kv", heads),
        }
        self.config: dict[str, Json] = {
            "model_type": "llama",
            "vocab_size": self.shapes["model.embed_tokens.weight"][0],
            "hidden_size": width,
            "num_hidden_layers": key("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._heads["k_proj"],
            "head_dim": head_dim,
            "intermediate_size": key("llama.feed_forward_length"),
            "rms_norm_eps": _float32(key("llama.attention.layer_norm_rms_epsilon")),
            "rope_theta": _float32(key("llama.rope.freq_base", 10_000.0)),
            "max_position_embeddings": key("llama.context_length"),
            # Tied embeddings are stored once.
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
            "bos_token_id": key("tokenizer.ggml.bos_token_id"),
            "eos_token_id": key("tokenizer.ggml.eos_token_id"),
            "pad_token_id": key("tokenizer.ggml.padding_token_id"),
        }

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        tensor = self._tensors[name]
        array = self._gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        array = array.reshape(self.shapes[name])
        projection = name.split(".")[-2]
        if projection in self._heads:
            # GGUF turns neighbouring dimensions of a head together, transformers those half a head apart.
            count, columns = self._heads[projection], array.shape[1]
            pairs = array.reshape(count, -1, 2, columns)
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        return array[index].astype(np.float32)

    def _name(self, name: str) -> str:
        *block, stem, leaf = name.split(".")
        if stem not in self.NAMES:
            return name
        prefix = f"model.layers.{block[1]}." if block else ""
        return f"{prefix}{self.NAMES[stem]}.{leaf}"


def save_gguf_tokenizer(path: Path, directory: Path) -> None:
    """Writes a GGUF file's tokenizer as tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Only the byte-level BPE that splits off every digit ("smollm") is supported: what splits text before the merges is
    in a GGUF file by name only, and with the wrong rule most texts still look right.
    """
    _, _, gguf = _open_gguf(path)
    kind = gguf("tokenizer.ggml.model"), gguf("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise ValueError(
            f"{path} has a tokenizer of the kind {kind}; only ('gpt2', 'smollm') is supported, for others take the "
            "model's own tokenizer.json"
        )
    tokens = gguf("tokenizer.ggml.tokens")
    control = 3  # GGUF's type of tokens that text must not turn into
    added = [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, each in enumerate(gguf("tokenizer.ggml.token_type"))
        if each == control
    ]
    bytes_of = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", **bytes_of},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", **bytes_of},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [each.split(" ") for each in gguf("tokenizer.ggml.merges")],
        },
    }
    named = {
        f"{role}_token": tokens[index]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        if (index := gguf(f"tokenizer.ggml.{key}_token_id")) is not None
    }
    # Another class would bring its own rule for splitting, in place of the one written here.
    settings = {**named, "tokenizer_class": "PreTrainedTokenizerFast"}
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", settings),
    ):
        (directory / name).write_text(json.dumps(content, ensure_ascii=False))
    template = gguf("tokenizer.chat_template")
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)


def _open_gguf(path: Path) -> tuple[Any, Any, Callable[..., Any]]:
    """The package, a reader, and a function from a key of the file (and a default) to its value."""
    try:
        gguf = importlib.import_module("gguf")
    except ModuleNotFoundError:
        raise ValueError(
            f"{path} needs the package gguf to be read: pip install 'gvjax[gguf]'"
        ) from None
    reader = gguf.GGUFReader(path)

    def key(name: str, default: Any = None) -> Any:
        field = reader.fields.get(name)
        return default if field is None else field.contents()

    return gguf, reader, key


def _float32(value: float) -> float:
    """The shortest decimal that is this float32: GGUF's 1e-5 is not 9.999999747378752e-06."""
    return float(str(np.float32(value)))

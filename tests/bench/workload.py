#!/usr/bin/env python3
"""Workload set W: random-weight models in Hugging Face layout, and random-token preference pairs.

Needs only numpy, safetensors and tokenizers.  Nothing is downloaded.

    python workload.py OUT_DIR [--models tiny-llama,llama-30m,...]

OUT_DIR/<model>/{config.json,model.safetensors,tokenizer.json,...} and
OUT_DIR/<model>/pairs.npz with int32 arrays prompt[N,P], chosen[N,C], rejected[N,C].
Every sequence is full length and holds no special token, so that all peers do the same work.
Models too large for a CPU (pythia-1.4b) get a config.json only: the GPU script fills them at random.
"""

import argparse
import json
import pathlib

import numpy as np

PAD, EOS, UNK = 0, 1, 2
N_SPECIAL = 3
# rope_theta is 1e6 throughout: one of the peers has that value wired in, and the cost is the same.
MODELS = {
    "tiny-llama": {
        "kind": "llama",
        "d": 128,
        "layers": 4,
        "heads": 4,
        "kv": 4,
        "ffn": 512,
        "vocab": 512,
        "P": 64,
        "C": 64,
    },
    "llama-30m": {
        "kind": "llama",
        "d": 512,
        "layers": 8,
        "heads": 8,
        "kv": 8,
        "ffn": 1376,
        "vocab": 8192,
        "P": 512,
        "C": 128,
    },
    "smollm2-135m": {
        "kind": "llama",
        "d": 576,
        "layers": 30,
        "heads": 9,
        "kv": 3,
        "ffn": 1536,
        "vocab": 49152,
        "P": 512,
        "C": 128,
    },
    "pythia-1.4b": {
        "kind": "neox",
        "d": 2048,
        "layers": 24,
        "heads": 16,
        "kv": 16,
        "ffn": 8192,
        "vocab": 50304,
        "P": 512,
        "C": 128,
        "config_only": True,
    },
    "tiny-neox": {
        "kind": "neox",
        "d": 128,
        "layers": 2,
        "heads": 4,
        "kv": 4,
        "ffn": 512,
        "vocab": 512,
        "P": 32,
        "C": 16,
        "config_only": True,
    },
}


def hf_config(m):
    if m["kind"] == "neox":
        return {
            "architectures": ["GPTNeoXForCausalLM"],
            "model_type": "gpt_neox",
            "hidden_size": m["d"],
            "intermediate_size": m["ffn"],
            "num_attention_heads": m["heads"],
            "num_hidden_layers": m["layers"],
            "vocab_size": m["vocab"],
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000,
            "max_position_embeddings": 2048,
            "use_parallel_residual": True,
            "tie_word_embeddings": False,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "bos_token_id": None,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            "torch_dtype": "float32",
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": m["d"],
        "intermediate_size": m["ffn"],
        "num_attention_heads": m["heads"],
        "num_key_value_heads": m["kv"],
        "num_hidden_layers": m["layers"],
        "head_dim": m["d"] // m["heads"],
        "vocab_size": m["vocab"],
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "torch_dtype": "float32",
    }


def n_params(m):
    """(all parameters, parameters in matmuls per token: the output head counted, the input lookup not)."""
    d, L, f, V = m["d"], m["layers"], m["ffn"], m["vocab"]
    hd = d // m["heads"]
    if m["kind"] == "neox":
        mat = L * (4 * d * d + 2 * d * f)
        rest = L * (4 * d + f + d + 4 * d) + 2 * d
        return mat + rest + 2 * V * d, mat + V * d
    mat = L * (2 * d * d + 2 * d * m["kv"] * hd + 3 * d * f)
    return mat + L * 2 * d + d + V * d, mat + V * d


def llama_weights(m, rng):
    d, f, hd = m["d"], m["ffn"], m["d"] // m["heads"]
    kvd = m["kv"] * hd

    def w(*shape):
        return rng.standard_normal(shape, dtype=np.float32) * 0.02

    out = {
        "model.embed_tokens.weight": w(m["vocab"], d),
        "model.norm.weight": np.ones(d, np.float32),
    }
    for i in range(m["layers"]):
        p = f"model.layers.{i}."
        out[p + "input_layernorm.weight"] = np.ones(d, np.float32)
        out[p + "post_attention_layernorm.weight"] = np.ones(d, np.float32)
        out[p + "self_attn.q_proj.weight"] = w(d, d)
        out[p + "self_attn.k_proj.weight"] = w(kvd, d)
        out[p + "self_attn.v_proj.weight"] = w(kvd, d)
        out[p + "self_attn.o_proj.weight"] = w(d, d)
        out[p + "mlp.gate_proj.weight"] = w(f, d)
        out[p + "mlp.up_proj.weight"] = w(f, d)
        out[p + "mlp.down_proj.weight"] = w(d, f)
    return out


def write_tokenizer(path, vocab):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": PAD, "<eos>": EOS, "<unk>": UNK}
    words.update({f"w{i}": i for i in range(N_SPECIAL, vocab)})
    t = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.add_special_tokens(["<pad>", "<eos>", "<unk>"])
    t.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "pad_token": "<pad>",
                "eos_token": "<eos>",
                "unk_token": "<unk>",
                "padding_side": "left",
                "model_max_length": 8192,
            }
        )
    )


def text(ids):
    return " ".join(f"w{i}" for i in ids)


def make(name, out, pairs=512, seed=0, weights=True):
    m = MODELS[name]
    path = pathlib.Path(out) / name
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    (path / "config.json").write_text(json.dumps(hf_config(m), indent=1))
    write_tokenizer(path, m["vocab"])
    if weights and not m.get("config_only"):
        from safetensors.numpy import save_file

        save_file(
            llama_weights(m, rng),
            str(path / "model.safetensors"),
            metadata={"format": "pt"},
        )

    def draw(n):
        return rng.integers(N_SPECIAL, m["vocab"], (pairs, n), dtype=np.int32)

    np.savez(
        path / "pairs.npz",
        prompt=draw(m["P"]),
        chosen=draw(m["C"]),
        rejected=draw(m["C"]),
    )
    return path


if __name__ == "__main__":
    ap = argparse.ArgumentParser()
    ap.add_argument("out")
    ap.add_argument("--models", default="tiny-llama,llama-30m,smollm2-135m,pythia-1.4b")
    a = ap.parse_args()
    for name in a.models.split(","):
        total, mat = n_params(MODELS[name])
        p = make(name, a.out)
        print(
            f"{name}: {total / 1e6:.2f} M parameters ({mat / 1e6:.2f} M in matmuls) -> {p.name}"
        )

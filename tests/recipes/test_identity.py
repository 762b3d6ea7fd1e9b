"""A run is its config and what stands behind the names in it."""

import jax.numpy as jnp
import pytest

from gvjax import config
from gvjax.checkpoint import content_hash
from gvjax.recipes import identity, loop

FIELDS = {
    "task": {"name": "tour"},
    "model": {"embed_dim": 16},
    "settings": {"recipe": "dpo", "steps": 2, "batch_size": 8},
    "start": "sft",
    "pairs": {"count": 8, "heldout": 8},
}


def settings_in(directory, **changes):
    fields = {**FIELDS, "run_dir": str(directory / "run"), **changes}
    fields["start"] = str(directory / "sft")
    return config.RunConfig.model_validate(fields)


def keep_params(directory, value):
    loop.save_params(directory, {"w": jnp.full(3, value)})


def begin(settings):
    found = identity.identity_of(settings)
    identity.compare(settings, found)
    identity.keep(settings, found)
    return found


def test_only_what_is_computed_is_compared(tmp_path):
    begin(settings_in(tmp_path))
    begin(
        settings_in(
            tmp_path,
            logging={"every": 3},
            checkpoints={"every": 7},
            timeouts={"step": 9.0},
        )
    )
    for changes in ({"seed": 5}, {"mesh": {"fsdp": 2}}, {"pairs": {"count": 9}}):
        with pytest.raises(config.ConfigError, match=r"was .* and is .*--force"):
            begin(settings_in(tmp_path, **changes))


def test_other_parameters_to_start_from_are_another_run(tmp_path):
    keep_params(tmp_path / "sft", 1.0)
    settings = settings_in(tmp_path)
    first = begin(settings)["files"]["start"]
    assert first == content_hash(tmp_path / "sft" / "params")

    (tmp_path / "sft").rename(tmp_path / "moved")
    keep_params(tmp_path / "sft", 1.0)
    assert begin(settings)["files"]["start"] == first

    (tmp_path / "sft").rename(tmp_path / "old")
    keep_params(tmp_path / "sft", 2.0)
    with pytest.raises(
        config.ConfigError, match=r"files\.start was '.*--force files\.start"
    ):
        begin(settings)
    found = identity.identity_of(settings)
    identity.compare(settings, found, ["files.start"])
    # A finished run stands, though what it read is gone.
    (tmp_path / "run" / "result.json").write_text("{}")
    with pytest.raises(config.ConfigError, match=r"files\.start was"):
        begin(settings)
    (tmp_path / "sft").rename(tmp_path / "away")
    begin(settings)


def test_files_and_folders_are_known_by_their_content(tmp_path):
    class Data(config.Section):
        train: config.FileName
        more: config.FileName | None = None
        name: str = "x"

    class Whole(config.Section):
        data: Data

    made = Whole(data=Data(train="a", more="b"))
    assert config.marked(made, config.FILE) == {"data.train": "a", "data.more": "b"}
    assert config.marked(Whole(data=Data(train="a")), config.FILE) == {
        "data.train": "a"
    }

    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "a").write_text("1")
    (folder / "deep" / "b").write_text("2")
    seen = {identity.content_of(folder), identity.content_of(folder / "a")}
    (folder / "a").write_text("2")
    seen |= {identity.content_of(folder), identity.content_of(folder / "a")}
    (folder / "a").rename(folder / "c")
    seen |= {identity.content_of(folder), identity.content_of(folder / "a")}
    assert len(seen) == 6 and None in seen


def test_a_changed_data_file_or_tokenizer_is_another_run(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("1")
    task = {
        "name": "mine",
        "rows": {"source": "jsonl", "path": str(tmp_path / "rows.jsonl")},
        "tokenizer": str(tmp_path / "model"),
        "template": "chatml",
        "max_prompt": 8,
        "max_completion": 8,
    }
    model = {"checkpoint": str(tmp_path / "model")}
    settings = settings_in(tmp_path, task=task, model=model)
    begin(settings)
    begin(settings)
    for changed, field in (
        ("rows.jsonl", "files.task.rows.path"),
        ("model/tokenizer.json", "files.model.checkpoint"),
        ("model/tokenizer.json", "files.task.tokenizer"),
    ):
        before = (tmp_path / changed).read_text()
        (tmp_path / changed).write_text("another")
        with pytest.raises(config.ConfigError, match=f"--force.* {field}"):
            begin(settings)
        (tmp_path / changed).write_text(before)
    begin(settings)


def test_code_given_by_import_path_is_read_and_the_librarys_own_is_not(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_code.py").write_text("def loss(): ...")
    for path, read in (
        ("my_code:loss", True),
        ("gvjax.losses:dpo_loss", False),
        ("sigmoid", False),
    ):
        section = {**FIELDS["settings"], "loss": path}
        files = identity.identity_of(settings_in(tmp_path, settings=section))["files"]
        assert ("settings.loss" in files) == read
        assert not read or len(files["settings.loss"]) == 64


def test_a_field_to_force_must_exist(tmp_path):
    settings = settings_in(tmp_path)
    with pytest.raises(config.ConfigError, match="did you mean 'seed'"):
        identity.compare(settings, identity.identity_of(settings), ["sed"])

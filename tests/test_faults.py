"""What a run does about faults that are not the end of the process."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml

from gvjax import __main__ as command_line
from gvjax import config, steps
from gvjax.masked import Mean
from gvjax.recipes import loop

QUIET = config.LoggingSection(tensorboard=False, every=1, sample_every=0)


def slope_of(params, batch):
    return Mean(jnp.sum(params["w"] * batch["x"]), jnp.ones(())), {}


STEP = jax.jit(steps.make_train_step(slope_of, optax.adam(0.1)))


def train(directory, values, **options):
    """A run whose batches hold one value each."""
    latest = {}

    def advance(state, round_):
        latest["x"] = jnp.full(2, values[round_])
        return STEP(state, latest)

    run = loop.Run(directory, {}, QUIET)
    state = steps.init_train_state({"w": jnp.zeros(2)}, optax.adam(0.1))
    return loop.train(
        run,
        state,
        advance,
        rounds=len(values),
        trained_on=lambda: latest,
        **options,
    )


def lines_of(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_bad_batch_is_skipped_and_counted_and_the_run_goes_on(tmp_path, bad):
    found = train(tmp_path / "bad", [1.0, 2.0, bad, 3.0], patience=2)
    lines = lines_of(tmp_path / "bad")
    assert [line["skipped"] for line in lines] == [0, 0, 1, 0]
    assert lines[2]["loss"] is None
    expected = train(tmp_path / "good", [1.0, 2.0, 3.0])
    np.testing.assert_array_equal(found.params["w"], expected.params["w"])


def test_bad_batches_in_a_row_stop_the_run_and_the_last_is_kept(tmp_path):
    values = [1.0, jnp.nan, 1.0, 1.0, jnp.nan, jnp.inf, 1.0]
    with pytest.raises(
        loop.NonFiniteError, match=r"up to 6; .*nonfinite\.npz"
    ) as error:
        train(tmp_path / "run", values, patience=2)
    assert "round 6 trained on" in str(error.value)
    with np.load(tmp_path / "run" / "nonfinite.npz") as kept:
        np.testing.assert_array_equal(kept["x"], [np.inf, np.inf])
    assert len(lines_of(tmp_path / "run")) == 6


@pytest.mark.parametrize("choice", ["stop", "continue"])
def test_the_config_says_what_a_full_disk_does(tmp_path, monkeypatch, choice):
    class Opened(Exception):
        pass

    def checkpoints(directory, **options):
        assert options["on_full_disk"] == choice
        raise Opened

    monkeypatch.setattr(loop, "Checkpoints", checkpoints)
    run = loop.Run(tmp_path, {}, QUIET, config.CheckpointSection(on_full_disk=choice))
    state = steps.init_train_state({"w": jnp.zeros(2)}, optax.adam(0.1))
    with pytest.raises(Opened):
        loop.train(run, state, lambda state, round_: (state, {}), rounds=1)


def test_a_run_directory_that_cannot_be_written_is_a_config_error(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    fields = {
        "run_dir": str(tmp_path / "file" / "run"),
        "task": {"name": "tour", "options": {"num_nodes": 6, "degree": 2}},
        "model": {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32},
        "settings": {"recipe": "sft", "steps": 1, "batch_size": 8},
    }
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(fields))
    assert command_line.main(["run", str(path)]) == command_line.CONFIG_ERROR
    assert "cannot be written to" in capsys.readouterr().err

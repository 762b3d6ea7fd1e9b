"""What a run does about faults that are not the end of the process."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml

from gvjax import __main__ as command_line
from gvjax import config, distributed, steps
from gvjax.checkpoint import Checkpoints
from gvjax.digests import json_hash
from gvjax.masked import Mean
from gvjax.recipes import loop
from gvjax.usage import ExitCode

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


def test_the_config_says_when_a_run_is_stuck(tmp_path, monkeypatch):
    class Opened(Exception):
        pass

    def watchdog(*, floor_s, first_s):
        assert (floor_s, first_s) == (7.0, 9.0)
        raise Opened

    monkeypatch.setattr(distributed, "Watchdog", watchdog)
    limits = config.TimeoutsSection(step=7.0, first_step=9.0)
    run = loop.Run(tmp_path, {}, QUIET, timeouts=limits)
    state = steps.init_train_state({"w": jnp.zeros(2)}, optax.adam(0.1))
    with pytest.raises(Opened):
        loop.train(run, state, lambda state, round_: (state, {}), rounds=1)


def test_a_checkpoint_says_what_it_is_of(tmp_path):
    run = loop.Run(
        tmp_path, {"seed": 3}, QUIET, config.CheckpointSection(every=2, keep=1)
    )
    state = steps.init_train_state({"w": jnp.zeros(2)}, optax.adam(0.1))

    def advance(state, round_):
        return STEP(state, {"x": jnp.full(2, 1.0)})

    loop.train(run, state, advance, rounds=5)
    with Checkpoints(tmp_path / "checkpoints", every_steps=1) as kept:
        abstract = {"train": state, "best": None}
        restored = kept.restore(jax.eval_shape(lambda: abstract))
    assert restored.step == 4 and restored.state["train"].step == 4
    assert restored.meta["identity"] == {"seed": 3}
    assert restored.meta["hash"] == json_hash({"seed": 3})
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    position = restored.meta["notes"]["log"]
    assert metrics[:position].count(b"\n") == 4
    assert {"gvjax", "jax", "jaxlib", "optax"} <= set(restored.versions)
    assert restored.processes == 1


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
    assert command_line.main(["run", str(path)]) == ExitCode.USER_ERROR
    assert "cannot be written to" in capsys.readouterr().err


def test_the_time_of_a_round_is_its_own(tmp_path, monkeypatch):
    """A device that takes a second a round and is told ten of them ahead: those that are written down wait for it."""
    told, clock = [], [0.0]

    def wait(made):
        clock[0] += len(told)
        told.clear()
        return made

    def advance(state, round_):
        told.append(round_)
        return state, {"loss": jnp.zeros(())}

    monkeypatch.setattr(jax, "block_until_ready", wait)
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    run = loop.Run(
        tmp_path, {}, config.LoggingSection(tensorboard=False, every=10, sample_every=0)
    )
    state = steps.init_train_state({"w": jnp.zeros(2)}, optax.adam(0.1))
    loop.train(run, state, advance, rounds=30)
    lines = (tmp_path / "timing.jsonl").read_text().splitlines()
    assert [json.loads(line)["step_time"] for line in lines] == [1.0, 1.0, 1.0]

"""Metrics: the same lines for the same run, times apart, and event files that can be read back."""

import json
import struct
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from gvjax.metrics import MetricsLog, read


def lines(path):
    return path.read_text().splitlines()


def events(directory):
    """(tag, step, value) of all scalars in TensorBoard's record files."""
    found = []
    for path in sorted(directory.glob("events*")):
        data = path.read_bytes()
        place = 0
        while place < len(data):
            # A record: its length, a checksum of that, the bytes, a checksum of those.
            (size,) = struct.unpack_from("<Q", data, place)
            event = event_pb2.Event.FromString(data[place + 12 : place + 12 + size])
            place += 12 + size + 4
            for value in event.summary.value:
                found.append((value.tag, event.step, value.simple_value))
    return found


def test_a_line_a_step_with_what_is_not_finite_as_null(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(1, {"loss": jnp.asarray(0.5), "kl": np.float64("nan")})
        log.write(2, {"loss": 2, "kl": float("-inf")})
    assert list(read(log.path)) == [
        {"global_step": 1, "loss": 0.5, "kl": None},
        {"global_step": 2, "loss": 2.0, "kl": None},
    ]
    # Strict JSON: no NaN or Infinity, which other readers refuse.
    for line in lines(log.path):
        json.loads(line, parse_constant=pytest.fail)
    assert not (tmp_path / "tensorboard").exists()


def test_times_are_kept_out_of_the_reproducible_file(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(1, {"loss": 0.5}, {"step_time": 0.1, "share/generate": 0.7})
        log.write(2, {"loss": 0.4})
    assert "time" not in log.path.read_text()
    assert "share" not in log.path.read_text()
    assert list(read(tmp_path / "timing.jsonl")) == [
        {"global_step": 1, "step_time": 0.1, "share/generate": 0.7}
    ]


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with MetricsLog(whole, tensorboard=False) as log:
        for step in range(4):
            log.write(step, {"loss": step / 2})
    with MetricsLog(broken, tensorboard=False) as log:
        for step in range(2):
            log.write(step, {"loss": step / 2})
        position = log.position()
        log.write(2, {"loss": 99.0})
    with MetricsLog(broken, tensorboard=False) as log:
        log.rewind(position)
        for step in range(2, 4):
            log.write(step, {"loss": step / 2})
    assert (broken / "metrics.jsonl").read_text() == (
        whole / "metrics.jsonl"
    ).read_text()


def test_rewinding_to_the_start_forgets_everything(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(1, {"loss": 1.0})
        log.rewind(0)
        log.write(1, {"loss": 2.0})
    assert list(read(log.path)) == [{"global_step": 1, "loss": 2.0}]


def test_written_lines_are_there_before_the_log_is_closed(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(1, {"loss": 1.0}, {"step_time": 1.0})
        log.flush()
        assert len(lines(log.path)) == 1
        assert len(lines(tmp_path / "timing.jsonl")) == 1


def test_what_the_disk_does_not_take_is_offered_again(tmp_path, monkeypatch, caplog):
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 1.0})
        log.flush()
        real, full = log._lines._file, [True]

        class Disk:
            name = real.name

            def write(self, data):
                # Half of a line fits, then nothing.
                if full == [True] and len(data) > 5:
                    full.append("noted")
                    return real.write(data[:5])
                if full[0]:
                    raise OSError(28, "No space left on device")
                return real.write(data)

            def __getattr__(self, name):
                return getattr(real, name)

        log._lines._file = Disk()
        log.write(2, {"loss": 2.0})
        with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl"):
            log.flush()
        log.write(3, {"loss": 3.0})
        with pytest.raises(OSError, match="No space left"):
            log.position()
        full[0] = False
        assert log.position() == (tmp_path / "metrics.jsonl").stat().st_size
    assert [line["loss"] for line in read(log.path)] == [1.0, 2.0, 3.0]


def test_tensorboard_that_cannot_be_written_is_given_up_aloud(tmp_path, caplog):
    with MetricsLog(tmp_path) as log:

        class Disk:
            def write_event(self, event):
                raise OSError(28, "No space left on device")

        log._events._writer = Disk()
        for step in range(20):
            log.write(step, {"loss": 1.0})
    assert caplog.text.count("no more TensorBoard events") == 1
    assert len(list(read(log.path))) == 20


def test_tensorboard_gets_numbers_and_times(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(3, {"loss": 0.5}, {"step_time": 0.25})
        log.write(4, {"loss": 0.25})
    found = events(tmp_path / "tensorboard")
    assert sorted(found) == [
        ("loss", 3, 0.5),
        ("loss", 4, 0.25),
        ("step_time", 3, 0.25),
    ]


def test_weights_and_biases_gets_numbers_and_times(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finished")

    class Wandb:
        @staticmethod
        def init(**options):
            calls.append(options)
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    directory = tmp_path / "my run"
    with MetricsLog(directory, tensorboard=False, wandb_project="mine") as log:
        log.write(1, {"loss": 0.5}, {"step_time": 0.1})
    assert calls == [
        {"project": "mine", "dir": str(directory), "name": "my run"},
        (1, {"loss": 0.5, "step_time": 0.1}),
        "finished",
    ]


def test_without_weights_and_biases_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'gvjax\[wandb\]'"):
        MetricsLog(tmp_path, tensorboard=False, wandb_project="mine")

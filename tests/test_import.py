"""What `import gvjax` brings along: arrays and transforms, nothing that reads files, draws or parses."""

import json
import subprocess
import sys

import gvjax

HEAVY = {
    "flax",
    "grain",
    "jinja2",
    "matplotlib",
    "orbax",
    "pandas",
    "pyarrow",
    "pydantic",
    "rich",
    "safetensors",
    "scipy",
    "tensorboardX",
    "tensorflow",
    "tensorflow_datasets",
    "tokenizers",
    "torch",
    "wandb",
    "yaml",
}
PROGRAM = """
import json, sys, time
import jax
before = set(sys.modules)
start = time.perf_counter()
import gvjax
seconds = time.perf_counter() - start
packages = {name.split(".")[0] for name in set(sys.modules) - before}
print(json.dumps([seconds, sorted(packages)]))
"""


def test_import_is_quick_and_pulls_in_no_heavy_library():
    # The best of three: another process on this machine must not decide.
    runs = []
    for _ in range(3):
        output = subprocess.run(
            [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True
        ).stdout
        runs.append(json.loads(output))
        if runs[-1][0] < 1.5:
            break
    seconds, packages = min(runs)
    assert "gvjax" in packages
    assert not HEAVY & set(packages)
    assert seconds < 1.5, "beyond `import jax`"


def test_every_public_name_is_there():
    assert len(set(gvjax.__all__)) == len(gvjax.__all__)
    for name in gvjax.__all__:
        assert getattr(gvjax, name) is not None

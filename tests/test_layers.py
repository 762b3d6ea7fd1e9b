"""Arrows point down: what may import what, read from the sources."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "gvjax"

LAYERS = {
    0: ["masked", "logps", "losses", "advantages", "tabular", "digests", "usage"],
    1: ["types"],
    2: [
        "steps",
        "models",
        "sampling",
        "sharding",
        "distributed",
        "runtime",
        "lanes",
        "checkpoint",
        "data",
        "tasks",
        "judges",
        "optim",
        "metrics",
    ],
    3: ["recipes", "gap", "verify", "config", "plan", "bench"],
    4: ["__main__", "commands"],
}
LAYER_OF = {part: layer for layer, parts in LAYERS.items() for part in parts}

ARRAYS = {"jax", "chex"}
HOST = {"numpy"}
ALLOWED = {
    "masked": ARRAYS,
    "logps": ARRAYS,
    "losses": ARRAYS,
    "advantages": ARRAYS,
    "tabular": HOST | {"scipy"},
    "digests": {"jax"} | HOST,
    "usage": set(),
    "types": ARRAYS | {"optax"},
    "steps": ARRAYS | {"optax"},
    # optax: low-rank training says which parameters a transform may touch.
    "models": ARRAYS | HOST | {"flax", "optax"},
    "sampling": ARRAYS,
    "sharding": {"jax"} | HOST,
    "distributed": {"jax"} | HOST,
    "runtime": {"jax"},
    "lanes": {"jax"},
    "optim": {"jax", "optax"},
    "tasks": HOST,
    # scipy: quantiles of Student's t.
    "judges": HOST | {"scipy"},
}
"""The third-party packages a part may import; parts that are not listed are held by DOORS alone."""

DOORS = {
    "flax": {"models"},
    "orbax": {"checkpoint"},
    "tensorflow_datasets": {"data"},
    "grain": {"data"},
    "pyarrow": {"data"},
    "tokenizers": {"data"},
    "pydantic": {"config"},
    "yaml": {"config"},
    "tensorboardX": {"metrics"},
    "wandb": {"metrics"},
    "matplotlib": {"gap"},
    # Two templates: what a model is shown, and what a reader is.
    "jinja2": {"data", "gap"},
    # Tables for people, each beside what it shows; progress where a run is watched.
    "rich": {
        *("data", "gap", "plan", "verify", "bench", "metrics"),
        *("__main__", "commands"),
    },
    # Converting weights of other libraries, which is what these packages are for.
    "safetensors": {"models"},
    "gguf": {"models"},
    "reasoning_gym": {"data"},
    "rouge_score": {"data"},
    "transformers": {"models"},
    "torch": {"models"},
}
"""One library, one door (two or three where the reason stands beside it)."""


def part_of(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: pathlib.Path) -> set[str]:
    """Full names of what a file imports, anywhere in it; `from gvjax import x` counts as gvjax.x."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            names |= (
                {f"gvjax.{alias.name}" for alias in node.names}
                if node.module == "gvjax"
                else {node.module or ""}
            )
    return names


def parts_imported(path: pathlib.Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith("gvjax.")}


def libraries(path: pathlib.Path) -> set[str]:
    tops = {name.split(".")[0] for name in imported(path)}
    return tops - sys.stdlib_module_names - {"gvjax"}


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
every_file = pytest.mark.parametrize(
    "path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES]
)


@every_file
def test_arrows_point_down(path):
    part = part_of(path)
    assert part in LAYER_OF, f"{part} belongs to no layer; give it one in LAYERS"
    for other in parts_imported(path) - {part, "__version__"}:
        assert other in LAYER_OF, f"{path} imports gvjax.{other}, which is no part"
        assert LAYER_OF[other] <= LAYER_OF[part], f"{part} may not know {other}"
        if LAYER_OF[part] == 2:
            assert LAYER_OF[other] < 2, f"{part} and {other} are siblings"


@every_file
def test_one_library_one_door(path):
    part = part_of(path)
    for library in libraries(path):
        doors = DOORS.get(library)
        assert doors is None or part in doors, f"{library} belongs in {doors}"
    if part in ALLOWED:
        assert libraries(path) <= ALLOWED[part] | {
            library for library, doors in DOORS.items() if part in doors
        }


def test_launch_imports_nothing_of_gvjax():
    for path in (ROOT.parent / "launch").rglob("*.py"):
        assert not {name for name in imported(path) if name.startswith("gvjax")}, path


def test_the_graph_has_no_cycle_inside_a_layer():
    arrows = {part: set() for part in LAYER_OF}
    for path in FILES:
        part = part_of(path)
        arrows[part] |= {
            other
            for other in parts_imported(path) - {part}
            if LAYER_OF.get(other) == LAYER_OF[part]
        }
    done: set[str] = set()
    while ready := {
        part for part in arrows if part not in done and arrows[part] <= done
    }:
        done |= ready
    assert done == set(arrows), f"these import each other: {set(arrows) - done}"

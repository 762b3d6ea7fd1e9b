"""The table of the paper's experiments says what the committed results say, recomputed from every seed's raw values."""

import gzip
import pathlib

import pytest

from gvjax import config
from gvjax.gap import contrasts
from gvjax.gap.results import StudyResults

ROOT = pathlib.Path(__file__).parent.parent
TABLE = (ROOT / "configs" / "paper" / "README.md").read_text(encoding="utf-8")
RUN = sorted((ROOT / "configs" / "results").glob("paper_*.json.gz"))
CONFIGS = sorted((ROOT / "configs" / "paper").glob("*.yaml"))


def number(value: float) -> str:
    return f"{value:+.3f}".replace("0.", ".", 1).replace("-", "−")


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.name)
def test_every_primary_contrast_stands_in_the_table(path):
    text = gzip.decompress(path.read_bytes()).decode()
    results = contrasts.analyse(StudyResults.from_json(text))
    for outcome in results.outcomes:
        if outcome.contrast.primary and outcome.measure == "gold":
            low, high = number(outcome.low), number(outcome.high)
            assert f"{number(outcome.estimate)} [{low}, {high}]" in TABLE, outcome


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.name)
def test_results_are_of_the_committed_config(path):
    name = path.name.removesuffix(".json.gz").removeprefix("paper_")
    results = StudyResults.from_json(gzip.decompress(path.read_bytes()).decode())
    declared = config.resolved(config.load(ROOT / "configs" / "paper" / f"{name}.yaml"))
    for part in ("seeds", "task", "sft", "pairs", "reward", "arms", "contrasts"):
        # Fields that were added since have their defaults.
        assert known(declared[part], results.config[part]) == results.config[part]


def known(value, like):
    """A value cut down to the fields that another one has."""
    if isinstance(value, dict) and isinstance(like, dict):
        return {key: known(value[key], like[key]) for key in like}
    return value


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_experiment_has_its_command_in_the_table(path):
    assert f"configs/paper/{path.name}`" in TABLE


def test_the_two_word_experiment_at_the_papers_scale_is_one_command():
    overrides = ["run_dir=runs/tldr_two_words", "task.max_completion=4"]
    assert " ".join(overrides) in TABLE
    for size in ("1b4", "2b8"):
        name = f"configs/tldr_pythia_{size}.yaml"
        assert f"gvjax compare {name}" in TABLE
        short, long = (config.load(ROOT / name, each) for each in (overrides, []))
        assert short.task.max_completion == 4 < long.task.max_completion

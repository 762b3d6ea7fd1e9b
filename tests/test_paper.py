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
LARGE = sorted((ROOT / "configs" / "paper" / "tldr").glob("*.yaml"))


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


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_every_experiment_at_the_papers_scale_is_one_command_with_its_values(path):
    settings = config.load(path)
    verb = "gap" if isinstance(settings, config.GapConfig) else "compare"
    assert f"`gvjax {verb} configs/paper/tldr/{path.name}`" in TABLE
    main = config.load(ROOT / "configs" / "tldr_pythia_1b4.yaml")
    assert f"gvjax compare configs/{main.study}.yaml" in TABLE
    assert settings.sft == main.sft and settings.model == main.model
    if verb == "compare":
        # What the paper compares is the same everywhere; a hypothesis adds arms.
        assert main.arms.items() <= settings.arms.items()
        assert settings.reward == main.reward

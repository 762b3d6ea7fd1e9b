"""The table of the paper's experiments says what the committed results say, recomputed from every seed's raw values."""

import gzip
import pathlib

import pytest

from gvjax import config
from gvjax.gap import contrasts
from gvjax.gap.findings import GapFindings
from gvjax.gap.results import StudyResults

ROOT = pathlib.Path(__file__).parent.parent
TABLE = (ROOT / "configs" / "paper" / "README.md").read_text(encoding="utf-8")
RESULTS = sorted((ROOT / "configs" / "results").glob("paper_*.json.gz"))
CONFIGS = sorted((ROOT / "configs" / "paper").glob("*.yaml"))
LARGE = sorted((ROOT / "configs" / "paper" / "tldr").glob("*.yaml"))


def declared(path: pathlib.Path):
    """The config that some results are of."""
    name = path.name.removesuffix(".json.gz").removeprefix("paper_")
    return config.load(ROOT / "configs" / "paper" / f"{name}.yaml")


RUN = [p for p in RESULTS if isinstance(declared(p), config.StudyConfig)]
MEASURED = [p for p in RESULTS if isinstance(declared(p), config.GapConfig)]
IN_THE_TABLE = (
    "verifier's lead in likelihood",
    "local reward model, lead over the DPO policy",
    "parameters instead",
)
"""Names, or their ends, of the numbers of a measurement that the paper has too."""


def number(value: float) -> str:
    return f"{value:+.3f}".replace("0.", ".", 1).replace("-", "−")


def with_interval(found) -> str:
    return f"{number(found.estimate)} [{number(found.low)}, {number(found.high)}]"


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.name)
def test_every_primary_contrast_stands_in_the_table(path):
    text = gzip.decompress(path.read_bytes()).decode()
    results = contrasts.analyse(StudyResults.from_json(text))
    for outcome in results.outcomes:
        if outcome.contrast.primary and outcome.measure == "gold":
            assert with_interval(outcome) in TABLE, outcome


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.name)
def test_every_measured_number_of_the_papers_stands_in_the_table(path):
    findings = GapFindings.from_json(gzip.decompress(path.read_bytes()).decode())
    found = [
        quantity
        for quantity in findings.tasks[0].quantities
        if quantity.name.endswith(IN_THE_TABLE)
    ]
    assert found
    for quantity in found:
        assert with_interval(quantity) in TABLE, quantity


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_results_are_of_the_committed_config(path):
    kind = StudyResults if path in RUN else GapFindings
    results = kind.from_json(gzip.decompress(path.read_bytes()).decode())
    now = config.resolved(declared(path))
    for part in set(results.config) - {"run_dir", "workers", "mesh", "logging"}:
        # Fields that were added since have their defaults.
        assert known(now[part], results.config[part]) == results.config[part], part


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

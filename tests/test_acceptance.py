"""The committed results say what the README and configs/results say they do, recomputed from every seed's raw values."""

import gzip
import pathlib

import numpy as np
import pytest

from gvjax.gap import contrasts
from gvjax.gap.results import StudyResults

RESULTS = pathlib.Path(__file__).parent.parent / "configs" / "results"


@pytest.fixture(scope="module")
def tour() -> StudyResults:
    return load("tour")


def load(name: str) -> StudyResults:
    return StudyResults.from_json(
        gzip.decompress((RESULTS / f"{name}.json.gz").read_bytes()).decode()
    )


def difference(results: StudyResults, task: str, a: str, b: str):
    """The declared contrast on raw gold, computed anew."""
    analysed = contrasts.analyse(results)
    for outcome in analysed.outcomes:
        declared = outcome.contrast
        if (declared.task, declared.a, declared.b, outcome.measure) == (
            task,
            a,
            b,
            "gold",
        ):
            return outcome
    raise AssertionError(f"{a} − {b} on {task} was not declared")


def test_the_seeds_are_new_and_enough(tour):
    seeds = [seed.seed for seed in tour.task("tour").start.seeds]
    assert len(seeds) >= 8
    assert not set(seeds) & set(range(5)), "seeds 0 to 4 were used to choose settings"


def test_the_online_road_is_ahead_on_tour(tour):
    found = difference(tour, "tour", "RLOO", "best offline")
    assert found.low > 0.05
    assert round(found.estimate, 3) == 0.146
    assert (round(found.low, 3), round(found.high, 3)) == (0.105, 0.187)


def test_the_advantage_is_gone_where_no_verifier_can_be_learned(tour):
    found = difference(tour, "hidden_goals", "RLOO", "best offline")
    assert abs(found.estimate) <= 0.06
    scorers = {each.name: each for each in tour.task("hidden_goals").scorers}
    accuracies = [seed.accuracy for seed in scorers["reward model"].seeds]
    assert abs(np.mean(accuracies) - 0.5) <= 0.06


def test_the_reward_model_predicts_better_than_dpos_implicit_reward_on_every_seed(tour):
    scorers = {each.name: each for each in tour.task("tour").scorers}
    for verifier, implicit in zip(
        scorers["reward model"].seeds, scorers["DPO implicit reward"].seeds
    ):
        assert verifier.seed == implicit.seed
        assert verifier.log_likelihood > implicit.log_likelihood


def test_what_did_not_come_out_for_the_online_road_stands_there_too(tour):
    hard = difference(tour, "tour", "online DPO", "best offline")
    assert hard.low < 0 < hard.high
    assert difference(tour, "tour", "GRPO", "best offline").high < 0

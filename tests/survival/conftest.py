"""Processes that tests end, freeze and starve, and the runs that nobody touched, to compare with."""

import pathlib

import pytest
from preloaded import Preloaded
from toy_runs import RECIPES, write_runs


@pytest.fixture(scope="session")
def preloaded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("survival")
    write_runs(directory)
    made = Preloaded(directory)
    yield made
    made.close()


@pytest.fixture(scope="session")
def whole(preloaded):
    """`whole(recipe)`: the directory of an unbroken run, made when first asked for, after the runs it starts from."""
    done = {}

    def make(recipe: str) -> pathlib.Path:
        if recipe not in done:
            for field in ("start", "reward_model"):
                if earlier := RECIPES[recipe].get(field):
                    make(earlier)
            process = preloaded.start("run", f"{recipe}.yaml")
            assert process.wait() == 0, process.said()
            done[recipe] = preloaded.directory / recipe
        return done[recipe]

    return make


@pytest.fixture(scope="session")
def study(preloaded):
    """The directory of an unbroken study by one process."""
    process = preloaded.start("compare", "study.yaml", "run_dir=study", "workers=1")
    assert process.wait() == 0, process.said()
    return preloaded.directory / "study"

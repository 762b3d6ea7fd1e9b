"""The plan of a recipe against the recipe itself: what is planned must be what runs."""

import pathlib

import jax
import pytest

from gvjax import config
from gvjax.plan import fitting, programs, report, targets
from gvjax.plan.compiling import Compiled
from gvjax.recipes import checks, single
from gvjax.recipes.ground import ground_of, task_of

ROOT = pathlib.Path(__file__).parents[2]
STUDY = config.load(ROOT / "configs" / "smoke.yaml", [])


@pytest.fixture(scope="module")
def ground():
    return ground_of(
        task_of(STUDY.task, 0),
        STUDY.model,
        config.MeshSection(),
        devices=jax.devices()[:1],
    )


def test_a_study_is_planned_recipe_by_recipe(ground):
    parts = fitting.parts_of(STUDY)
    assert [part.name for part in parts[:2]] == ["sft", "reward"]
    assert [part.name for part in parts[2:]] == list(STUDY.arms)
    for part in parts:
        assert part.stage(ground).programs


RECIPES = [*single.TRAIN, "sft", "reward", "best_of_n"]


def small_section(recipe):
    small = {
        "steps": 2,
        "batch_size": 4,
        "prompts_per_step": 4,
        "samples_per_prompt": 2,
        "on_policy_prompts": 4,
        "n": 4,
    }
    kind = {
        section.model_fields["recipe"].default: section
        for section in config.Recipe.__subclasses__()
    }[recipe]
    given = {name: size for name, size in small.items() if name in kind.model_fields}
    return kind(**given)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_a_plan_whose_programs_compile(ground, recipe):
    section = small_section(recipe)
    stage = programs.stage_of(
        recipe, section, ground, pairs=None, evaluated=4, select="best"
    )
    names = [program.name for program in stage.programs]
    assert len(set(names)) == len(names)
    if recipe == "best_of_n":
        assert stage.batch is None
        return
    assert "train step" in names
    policy = programs.bytes_per_device(ground.policy_shapes())
    scorer = programs.bytes_per_device(ground.reward_model_shapes())
    trained = {"ppo": policy + scorer, "reward": scorer}.get(recipe, policy)
    assert stage.held["params"] == trained
    # AdamW's two moments, and a few counters.
    assert 0 <= stage.held["optimizer"] - 2 * trained < 100
    for program in stage.programs:
        lowered = program.lower()
        assert lowered.as_text()


def test_adapters_are_planned_beside_one_frozen_policy(ground):
    adapters = config.LoraSection(rank=2)
    made = ground_of(
        task_of(STUDY.task, 0),
        STUDY.model,
        config.MeshSection(),
        adapters,
        jax.devices()[:1],
    )
    section = config.DpoSection(batch_size=4)
    stage = programs.stage_of("dpo", section, made, pairs=None, evaluated=4)
    policy = programs.bytes_per_device(made.policy_shapes())
    assert stage.held["reference"] == policy > stage.held["params"]
    for program in stage.programs:
        assert program.lower().as_text()
        if program.name in ("train step", "sample 4 x 1"):
            assert {"params", "reference"} <= set(program.arguments)


def test_what_lies_beside_a_program(ground):
    section = config.OnlineDpoSection(prompts_per_step=4, samples_per_prompt=2)
    stage = programs.stage_of("o", section, ground, pairs=None, evaluated=4)
    by_name = {program.name: program for program in stage.programs}
    assert set(stage.held) == {"params", "optimizer", "reference", "reward model"}
    beside_step = stage.beside(by_name["train step"])
    assert beside_step == stage.held["reference"] + stage.held["reward model"]
    sample = by_name["sample 4 x 2"]
    assert sample.cache > 0
    total = sum(stage.held.values())
    assert stage.beside(sample) == total - stage.held["params"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_seeds_that_are_done_at_once_are_planned_as_one_program(ground, recipe):
    part = fitting.Part(recipe, small_section(recipe), {"pairs": None, "evaluated": 4})
    one, three = part.stage(ground), part.of_seeds(3).stage(ground)
    assert three.held == one.held
    for program, alone in zip(three.programs, one.programs, strict=True):
        arguments, single = (
            len(jax.tree.leaves(each.lower().in_avals)) for each in (program, alone)
        )
        assert arguments == program.seeds * single
        if program.seeds == 1:
            # What the other two hold lies beside what one begins with.
            assert three.beside(program) >= one.beside(alone)
            continue
        assert program.seeds == 3
        assert three.beside(program) == 3 * one.beside(alone)
        assert program.work.flops == 3 * alone.work.flops
        assert program.donates == 3 * alone.donates
    made_once = {program.name for program in three.programs if program.seeds == 1}
    assert made_once <= {"init", "init reward model", "start"}
    assert len(made_once) < len(three.programs)


def test_what_a_program_of_several_seeds_reads_is_shown_of_all(ground):
    part = fitting.Part("dpo", small_section("dpo"), {"pairs": None, "evaluated": 4})
    shown = []
    for seeds in (1, 3):
        stage = part.of_seeds(seeds).stage(ground)
        step = next(each for each in stage.programs if each.name == "train step")
        row = fitting.Row(step, Compiled(2**20 * seeds), stage.beside(step))
        planned = fitting.Planned(stage, (row,), 2.0**30)
        shown.append(report.stage_json(planned, targets.target("v5e-1")))
    one, three = shown
    assert three["held"] == {name: 3 * size for name, size in one["held"].items()}
    parts, of_three = (each["programs"][0]["parts"] for each in shown)
    assert of_three == {name: 3 * size for name, size in parts.items()}
    assert parts["activations"] > 0


def test_a_study_says_how_many_seeds_are_done_at_once():
    together = STUDY.model_copy(update={"seeds_together": 2})
    assert {part.seeds for part in fitting.parts_of(together)} == {2}
    assert {part.seeds for part in fitting.parts_of(STUDY)} == {1}


def test_seeds_at_once_need_one_device():
    together = STUDY.model_copy(update={"seeds": (0, 1), "seeds_together": 2})
    checks.check_seeds_together(together, 1)
    with pytest.raises(config.ConfigError, match="mesh has 4 devices"):
        checks.check_seeds_together(together, 4)


def test_a_tensor_axis_over_hosts_is_refused():
    mesh = config.MeshSection(data=1, fsdp=-1, tensor=16)
    with pytest.raises(config.ConfigError, match="beyond a host"):
        fitting.check_mesh(mesh, targets.target("h100-32"))
    fitting.check_mesh(mesh, targets.target("v5e-16"))


class FakePart:
    """A recipe whose stages are named by what was changed about them."""

    def __init__(self, rows=64, seeds=1):
        self.rows, self.seeds = rows, seeds
        self.section = config.DpoSection(batch_size=rows)

    def of_seeds(self, seeds):
        return FakePart(self.rows, seeds)

    def stage(self, ground, **changes):
        made = {"batch_size": self.rows, "num_microbatches": 1, **changes}
        rows = self.seeds * made["batch_size"]
        name = f"{rows} {made['num_microbatches']} {ground.model.remat}"
        return programs.Stage(name, {}, (), ("batch_size", made["batch_size"]))


@pytest.fixture
def gib_a_row(monkeypatch):
    """A GiB for every row of a micro-batch, three quarters of it or half with remat, of 16."""

    def planned(stage, compiler, target):
        rows, slices, remat = stage.name.split()
        share = {"none": 1.0, "dots": 0.75, "full": 0.5}[remat]
        peak = int(share * int(rows) * 2**30) // int(slices)
        row = fitting.Row(None, Compiled(peak), 0)
        return fitting.Planned(stage, (row,), 16 * 2**30)

    monkeypatch.setattr(fitting, "_planned", planned)


def test_the_largest_batch_is_found_by_bisection(ground, gib_a_row):
    assert fitting._largest_batch(FakePart(), ground, None, None) == ("batch_size", 16)


@pytest.mark.parametrize(
    ("rows", "seeds", "expected", "gib"),
    [
        # Half of 64 GiB is too much still; in two slices it is 16.
        (64, 1, "model.remat=full num_microbatches=2", 16),
        (32, 1, "model.remat=full", 16),
        # The cheapest that fits.
        (20, 1, "model.remat=dots", 15),
        # Seeds one after the other cost nothing.
        (8, 4, "seeds_together=2", 16),
        (20, 3, "seeds_together=1 model.remat=dots", 15),
    ],
)
def test_what_would_fit(ground, gib_a_row, rows, seeds, expected, gib):
    def on(model, mesh):
        return ground_of(
            task_of(STUDY.task, 0),
            model,
            config.MeshSection(),
            devices=jax.devices()[:1],
        ), None

    part = FakePart(rows, seeds)
    found = fitting._remedies(part, STUDY, None, ground, None, on)
    assert list(found) == [(expected, gib * 2**30)]


def test_a_refused_program_does_not_fit():
    row = fitting.Row(None, Compiled(1, refused=True), 0)
    assert not fitting.Planned(programs.Stage("s", {}, ()), (row,), 2.0).fits

"""The plan of a recipe against the recipe itself: what is planned must be what runs."""

import dataclasses
import pathlib
import types

import jax
import pytest

from gvjax import config, sharding
from gvjax.models import cost
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
    # Frozen weights have no gradient, and no update.
    (step,) = [each for each in stage.programs if each.name == "train step"]
    forward = programs.forward_flops(made, 8, group=2)
    assert step.work.flops == 2 * forward
    assert step.work.bytes < 3 * policy
    plain = dataclasses.replace(made, lora=None)
    stage_of_all = programs.stage_of("dpo", section, plain, pairs=None, evaluated=4)
    (of_all,) = [p for p in stage_of_all.programs if p.name == "train step"]
    assert of_all.work.flops == 3 * forward
    assert of_all.work.bytes > 7 * policy
    for program in stage.programs:
        assert program.lower().as_text()
        if program.name in ("train step", "sample 4 x 1"):
            assert {"params", "reference"} <= set(program.arguments)


def test_a_shared_prompt_is_run_once_where_the_program_does(ground):
    def step(share, **changes):
        section = config.PolicyGradientSection(
            prompts_per_step=2, samples_per_prompt=4, **changes
        )
        made = dataclasses.replace(
            ground, prompt_length=24, completion_length=8, share_prompts=share
        )
        stage = programs.stage_of("rloo", section, made, pairs=None, evaluated=0)
        return {program.name: program.work.flops for program in stage.programs}

    plain, shared = step(False), step(True)
    grouped = 2 * cost.grouped_flops(ground.model, 24, 8, 4)
    each = 8 * cost.forward_flops(ground.model, 32, scored=8)
    assert shared["score 8 by 4"] == grouped and shared["train step"] == 3 * grouped
    assert plain["score 8"] == each and plain["train step"] == 3 * each
    # A micro-batch need not hold whole groups.
    sliced = step(True, num_microbatches=2)
    assert sliced["train step"] == plain["train step"]
    assert sliced["reward scoring 8"] == plain["reward scoring 8"] < each


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
    """A recipe whose programs' keys say how large they are."""

    def __init__(self, section, seeds=1):
        self.section, self.seeds = section, seeds

    def of_seeds(self, seeds):
        return FakePart(self.section, seeds)

    def stage(self, ground, **changes):
        made = self.section.model_copy(update=changes)
        split = ground.mesh.shape["fsdp"]
        rows = self.seeds * made.batch_rows // sharding.batch_shards(ground.mesh)
        step = (rows, made.num_microbatches, ground.model.remat, split)
        called = [
            programs.Program("train step", step, None),
            programs.Program("sample", (split, ground.model.remat), None),
        ]
        return programs.Stage("s", {}, tuple(called), ("batch_size", made.batch_rows))


class FakeCompiler:
    """A GiB for every row of a micro-batch, three quarters of it or half with remat, and 4 of parameters; sampling takes
    `sampling`. What fsdp splits is the parameters and the sampling."""

    def __init__(self, sampling=0.0):
        self.sampling, self.compiled = sampling, []

    def __call__(self, program):
        if program.key not in self.compiled:
            self.compiled.append(program.key)
        if program.name == "sample":
            return Compiled(int(self.sampling * 2**30) // program.key[0])
        rows, slices, remat, split = program.key
        of_row = {"none": 1.0, "dots": 0.75, "full": 0.5}[remat]
        return Compiled(int((of_row * rows / slices + 4 / split) * 2**30))


def cheapest(section, remat="none", *, data=1, seeds=1, sampling=0.0, gather=False):
    """(what `_cheapest` says with a room of 16 GiB, the keys of what it compiled for it)."""
    mesh = config.MeshSection(data=data, gather_for_sampling=gather)
    model = {**STUDY.model, "remat": remat}
    settings = STUDY.model_copy(update={"model": model, "mesh": mesh})
    compiler = FakeCompiler(sampling)

    def on(model, mesh):
        devices = jax.devices()[:data]
        task = task_of(STUDY.task, 0)
        return ground_of(task, model, mesh, devices=devices), compiler

    ground, _ = on(model, mesh)
    part = FakePart(section, seeds)
    found = fitting._planned(part.stage(ground), compiler, ROOM)
    before = len(compiler.compiled)
    arguments = (part, found, settings, ROOM, ground, compiler, on)
    return fitting._cheapest(*arguments), compiler.compiled[before:]


ROOM = types.SimpleNamespace(usable=16 * 2**30)


def dpo(rows, **changes):
    return config.DpoSection(batch_size=rows, **changes)


def online(prompts):
    return config.OnlineDpoSection(prompts_per_step=prompts)


SPLIT = "mesh.data=1 mesh.fsdp=-1"


def test_the_largest_batch_is_found_by_bisection(ground):
    found = fitting._largest_batch(FakePart(dpo(64)), ground, FakeCompiler(), ROOM)
    assert found == ("batch_size", 12)


@pytest.mark.parametrize(
    ("section", "given", "expected", "gib"),
    [
        # Micro-batches cost about nothing; the fewest that fit.
        (dpo(64), {}, "num_microbatches=8", 12),
        (dpo(24), {}, "num_microbatches=2", 16),
        (dpo(48, num_microbatches=2), {}, "num_microbatches=4", 16),
        # So those of them without remat, where the config has it and does not fit either.
        (dpo(64), {"remat": "full"}, "model.remat=none num_microbatches=8", 12),
        # An odd number of rows cannot be cut.
        (dpo(15), {}, "model.remat=dots", 15.25),
        (dpo(23), {}, "model.remat=full", 15.5),
        # Nor can a loss that compares rows.
        (dpo(16, loss="aot", beta=0.1), {}, "model.remat=dots", 16),
        # Seeds one after the other cost nothing.
        (dpo(6), {"seeds": 4}, "seeds_together=2", 16),
        (dpo(15), {"seeds": 3}, "seeds_together=1 model.remat=dots", 15.25),
        (dpo(16), {"seeds": 2}, "seeds_together=1 num_microbatches=2", 12),
        # Less of the parameters on each of two devices costs less than recomputing everything,
        (dpo(34), {"data": 2}, f"model.remat=dots {SPLIT}", 14.75),
        # but more than that where every token that is sampled gathers them.
        (online(34), {"data": 2}, "model.remat=full", 12.5),
        (online(34), {"data": 2, "gather": True}, f"model.remat=dots {SPLIT}", 14.75),
        # Only this makes room for samples.
        (dpo(28), {"data": 2, "sampling": 24.0}, SPLIT, 16),
    ],
)
def test_what_would_fit_at_the_least_cost(section, given, expected, gib):
    found, _ = cheapest(section, **given)
    assert found == (expected, gib * 2**30)


def test_what_fits_and_recomputes_less_is_told():
    for rows, expected, gib in (
        (8, "model.remat=none", 12),
        (24, "model.remat=none num_microbatches=2", 16),
    ):
        found, _ = cheapest(dpo(rows), "full")
        assert found == (expected, gib * 2**30)
    # Neither of these would fit without.
    assert cheapest(dpo(23), "full")[0] is None
    assert cheapest(dpo(15), "dots")[0] is None


def test_no_more_is_compiled_than_changes():
    # One update, and no sampling again.
    assert cheapest(dpo(8), "full")[1] == [(8, 1, "none", 1)]
    assert cheapest(dpo(8), "none") == (None, [])
    # No remat makes room for samples.
    assert cheapest(dpo(8), "none", sampling=40.0) == (None, [])
    # Of micro-batches the most, and those between where the most fit.
    found, compiled = cheapest(dpo(8 * 19))
    assert found == ("model.remat=full num_microbatches=8", 13.5 * 2**30)
    assert [(slices, remat) for _, slices, remat, _ in compiled] == [
        (8, "none"),
        *((1, "dots"), (8, "dots")),
        *((1, "full"), (8, "full"), (2, "full"), (4, "full")),
    ]


def test_a_refused_program_does_not_fit():
    row = fitting.Row(None, Compiled(1, refused=True), 0)
    assert not fitting.Planned(programs.Stage("s", {}, ()), (row,), 2.0).fits

"""Whole plans: every stage of a run or study on a target, whether it fits, and what would where it does not."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gvjax import config, sharding
from gvjax.models.config import REMAT
from gvjax.plan.compiling import Compiled, Compiler
from gvjax.plan.programs import Program, Stage, stage_of
from gvjax.plan.targets import Target
from gvjax.recipes import checks
from gvjax.recipes.ground import Ground, ground_of, task_of

MAX_ROWS = 2**20
"""No batch larger than this is looked for."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One program of a stage, as planned.

    Attributes:
      program: what was compiled.
      compiled: what the compiler says of it.
      beside: bytes per device of what lies in memory beside it.
    """

    program: Program
    compiled: Compiled
    beside: int

    @property
    def total(self) -> int:
        """Bytes per device while it runs."""
        return self.compiled.peak + self.beside


@dataclasses.dataclass(frozen=True)
class Planned:
    """One stage on a target.

    Attributes:
      stage: what it holds and compiles.
      rows: one for each program.
      usable: bytes per device.
      remedies: what would fit, where this does not: `key=value` overrides with the bytes that they bring it to.
      most: (field, largest number of rows that fits); None where it was not looked for, or nothing fits.
    """

    stage: Stage
    rows: tuple[Row, ...]
    usable: float
    remedies: tuple[tuple[str, int], ...] = ()
    most: tuple[str, int] | None = None

    @property
    def peak(self) -> int:
        """Bytes per device of the program that needs most."""
        return max(row.total for row in self.rows)

    @property
    def fits(self) -> bool:
        return self.peak <= self.usable and not any(
            row.compiled.refused for row in self.rows
        )


@dataclasses.dataclass(frozen=True)
class Part:
    """One recipe of a config.

    Attributes:
      name: for people.
      section: its settings.
      more: further arguments of `programs.stage_of`.
    """

    name: str
    section: config.Recipe
    more: dict[str, Any]

    @property
    def seeds(self) -> int:
        """How many are done at once."""
        return self.more.get("seeds", 1)

    def of_seeds(self, seeds: int) -> "Part":
        """The same of another number of seeds at once."""
        return dataclasses.replace(self, more={**self.more, "seeds": seeds})

    def stage(self, ground: Ground, **changes: Any) -> Stage:
        """What it compiles on a ground, some of its fields changed."""
        section = self.section.model_copy(update=changes)
        return stage_of(self.name, section, ground, **self.more)


def parts_of(settings: config.RunConfig | config.StudyConfig) -> list[Part]:
    """The recipes of a run (one) or of a study: SFT, reward model, and every arm with each size its sweep tries."""
    if isinstance(settings, config.RunConfig):
        section = settings.settings
        judged = section.recipe not in ("sft", "reward")
        more = {
            "pairs": settings.pairs,
            "evaluated": settings.evaluation.validation_prompts if judged else 0,
            "select": settings.select,
        }
        return [Part(section.recipe, section, more)]
    shared: dict[str, Any] = {
        "evaluated": settings.evaluation.validation_prompts,
        "pooling": settings.reward.pooling,
        "seeds": settings.seeds_together,
    }
    parts = [
        Part("sft", settings.sft, {**shared, "pairs": None, "evaluated": 0}),
        Part("reward", settings.reward, {**shared, "pairs": settings.pairs}),
    ]
    for name, arm in settings.arms.items():
        tried: list[Any] = []
        for section in config.arm_settings(arm):
            if _sizes(section) not in map(_sizes, tried):
                tried.append(section)
        more = {**shared, "pairs": None, "select": arm.select}
        for number, section in enumerate(tried):
            label = f"{name} ({number + 1})" if len(tried) > 1 else name
            parts.append(Part(label, section, more))
    return parts


def _sizes(section: config.Recipe) -> dict[str, Any]:
    """The fields that a program's memory may depend on: all but real numbers, such as a learning rate."""
    fields = section.model_dump(exclude={"optimizer"})
    return {name: value for name, value in fields.items() if type(value) is not float}


def plan(
    settings: config.RunConfig | config.StudyConfig,
    target: Target,
    devices: Any,
    *,
    only: Sequence[str] = (),
    search: bool = True,
    max_batch: bool = False,
    watch: Callable[[str], None] = lambda text: None,
) -> Iterator[Planned]:
    """Plans one stage after the other.

    Args:
      settings: the run or study; its mesh is laid over `devices`.
      target: the machine.
      devices: of it, from `compiling.devices`.
      only: names of parts; () plans all.
      search: where a stage does not fit, look for what would.
      max_batch: look for the largest batch of every stage that trains.
      watch: told what is being compiled.

    Raises:
      ConfigError: the config does not fit the devices.
    """
    check_mesh(settings.mesh, target)
    task = task_of(settings.task, _seed(settings))
    adapters = settings.lora

    def on(model: dict[str, Any], mesh: config.MeshSection) -> tuple[Ground, Compiler]:
        ground = ground_of(task, model, mesh, adapters, devices)
        return ground, Compiler(ground.mesh, lambda name: watch(f"{label}: {name}"))

    label = ""
    ground, compiler = on(settings.model, settings.mesh)
    if isinstance(settings, config.StudyConfig):
        checks.check_seeds_together(settings, ground.mesh.size)
    parts = parts_of(settings)
    if only:
        names = [part.name for part in parts]
        asked = {config.known(name, names, "--only") for name in only}
        parts = [part for part in parts if part.name in asked]
    for part in parts:
        label = part.name
        with config.refusing(f"recipe {part.section.recipe}"):
            checks.check_rows(part.section, ground)
    for part in parts:
        label = part.name
        found = _planned(part.stage(ground), compiler, target)
        if not found.fits and search:
            remedies = tuple(_remedies(part, settings, target, ground, compiler, on))
            found = dataclasses.replace(found, remedies=remedies)
        if found.stage.batch is not None and (max_batch or (search and not found.fits)):
            most = _largest_batch(part, ground, compiler, target)
            found = dataclasses.replace(found, most=most)
        yield found


def check_mesh(mesh: config.MeshSection, target: Target) -> None:
    """Refuses a tensor axis over the slow network.

    Raises:
      ConfigError: it leaves a slice, or a GPU host.
    """
    if mesh.tensor > 0 and target.tensor_reach % mesh.tensor:
        where = "a slice" if target.chip.platform == "tpu" else "a host"
        raise config.ConfigError(
            f"mesh.tensor is {mesh.tensor}, which would reach beyond {where} ({target.tensor_reach} devices of "
            f"{target.name}), over the slow network; use a divisor of {target.tensor_reach}"
        )


def _seed(settings: config.RunConfig | config.StudyConfig) -> int:
    return (
        settings.seed if isinstance(settings, config.RunConfig) else settings.seeds[0]
    )


def _planned(stage: Stage, compiler: Compiler, target: Target) -> Planned:
    rows = tuple(
        Row(program, compiler(program), stage.beside(program))
        for program in stage.programs
    )
    return Planned(stage, rows, target.usable)


def _remedies(
    part: Part,
    settings: config.RunConfig | config.StudyConfig,
    target: Target,
    ground: Ground,
    compiler: Compiler,
    on: Callable[..., tuple[Ground, Compiler]],
) -> Iterator[tuple[str, int]]:
    """Changes that keep the numbers a run comes to, and make it fit: fewer seeds at once, smaller slices of the batch, remat,
    sharding."""
    model, mesh = settings.model, settings.mesh
    changes: list[tuple[str, dict, config.MeshSection]] = []
    alone: list[str] = []
    while part.seeds > 1:
        part = part.of_seeds(part.seeds // 2)
        alone = [f"seeds_together={part.seeds}"]
        found = _planned(part.stage(ground), compiler, target)
        if found.fits:
            yield alone[0], found.peak
            return
    fields = alone
    # The cheapest first: what recomputes less takes less time.
    for policy in REMAT[REMAT.index(ground.model.remat) + 1 :]:
        fields = [*alone, f"model.remat={policy}"]
        model = {**model, "remat": policy}
        changes.append((" ".join(fields), model, mesh))
    if ground.mesh.shape["data"] > 1:
        fields = [*fields, "mesh.data=1", "mesh.fsdp=-1"]
        mesh = mesh.model_copy(update={"data": 1, "fsdp": -1})
        changes.append((" ".join(fields), model, mesh))
    for text, changed_model, changed_mesh in changes:
        ground, compiler = on(changed_model, changed_mesh)
        try:
            checks.check_rows(part.section, ground)
        except ValueError:
            continue
        found = _planned(part.stage(ground), compiler, target)
        if found.fits:
            yield text, found.peak
            return
    slices = getattr(part.section, "num_microbatches", None)
    batch = part.stage(ground).batch
    if slices is None or batch is None:
        return
    shards = sharding.batch_shards(ground.mesh)
    rows = getattr(part.section, "batch_rows", None) or batch[1]
    while (slices := 2 * slices) and rows % (slices * shards) == 0:
        found = _planned(part.stage(ground, num_microbatches=slices), compiler, target)
        if found.fits:
            yield " ".join([*fields, f"num_microbatches={slices}"]), found.peak
            return


def _largest_batch(
    part: Part, ground: Ground, compiler: Compiler, target: Target
) -> tuple[str, int] | None:
    """Bisects for the largest number of rows that fits."""
    stage = part.stage(ground)
    assert stage.batch is not None
    field, given = stage.batch
    shards = sharding.batch_shards(ground.mesh)
    unit = shards * getattr(part.section, "num_microbatches", 1)

    def fits(units: int) -> bool:
        tried = part.stage(ground, **{field: units * unit})
        return _planned(tried, compiler, target).fits

    low, high = 0, max(given // unit, 1)
    while fits(high):
        if high * unit >= MAX_ROWS:
            return field, high * unit
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return (field, low * unit) if low else None

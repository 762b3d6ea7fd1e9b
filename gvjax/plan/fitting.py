"""Whole plans: every stage of a run or study on a target, whether it fits, and what would where it does not."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from gvjax import config, losses, sharding
from gvjax.models.config import REMAT
from gvjax.plan.compiling import Compiled, Compiler
from gvjax.plan.programs import Program, Stage, stage_of
from gvjax.plan.targets import Target
from gvjax.recipes import checks, dpo
from gvjax.recipes.ground import Ground, ground_of, task_of

MAX_ROWS = 2**20
"""No batch larger than this is looked for."""

RECOMPUTED = {"none": 0.0, "dots": 0.1, "full": 1 / 3}
"""Share of a step's time that a remat policy is predicted to add: "full" is a forward again, of three; "dots" is what lies
between the matrix products again, and attention."""

SPLIT, SPLIT_SAMPLING = 0.2, 1.0
"""The same for the data axis given to fsdp, which gathers every matrix twice a step where data parallelism adds up gradients
once: half as much again goes over the network, in part while products run. A recipe that samples gathers all of them at
every token, unless `mesh.gather_for_sampling`."""


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

    def fits(self, usable: float) -> bool:
        return self.total <= usable and not self.compiled.refused


@dataclasses.dataclass(frozen=True)
class Planned:
    """One stage on a target.

    Attributes:
      stage: what it holds and compiles.
      rows: one for each program.
      usable: bytes per device.
      cheapest: `key=value` overrides that fit and are predicted to cost least time, with the bytes that they bring it to;
        where this fits, such as cost less than its own remat. None where there are none or it was not looked for.
      most: (field, largest number of rows that fits); None where it was not looked for, or nothing fits.
    """

    stage: Stage
    rows: tuple[Row, ...]
    usable: float
    cheapest: tuple[str, int] | None = None
    most: tuple[str, int] | None = None

    @property
    def peak(self) -> int:
        """Bytes per device of the program that needs most."""
        return max(row.total for row in self.rows)

    @property
    def fits(self) -> bool:
        return all(row.fits(self.usable) for row in self.rows)


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
      search: where a stage does not fit, look for what would; where it recomputes something, for what fits without.
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
        if search:
            cheapest = _cheapest(part, found, settings, target, ground, compiler, on)
            found = dataclasses.replace(found, cheapest=cheapest)
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


def _planned(
    stage: Stage,
    compiler: Callable[[Program], Compiled],
    target: Target,
    known: Mapping[str, Row] = MappingProxyType({}),
) -> Planned:
    """A stage compiled, but for those programs that are known by name."""
    rows = tuple(
        known.get(program.name)
        or Row(program, compiler(program), stage.beside(program))
        for program in stage.programs
    )
    return Planned(stage, rows, target.usable)


def _cheapest(
    part: Part,
    found: Planned,
    settings: config.RunConfig | config.StudyConfig,
    target: Target,
    ground: Ground,
    compiler: Callable[[Program], Compiled],
    on: Callable[..., tuple[Ground, Callable[[Program], Compiled]]],
) -> tuple[str, int] | None:
    """What fits at the least predicted cost in time, of changes that keep the numbers a run comes to.

        fewer seeds at once     nothing: a busy device takes as long for them one after the other
        more micro-batches      about nothing: 3% at most is what steps are held to
        remat dots, full        a tenth; a third: see `RECOMPUTED`
        data axis to fsdp       a fifth; where it samples, more than anything else: see `SPLIT`

    Fewer seeds are tried first. Then remat policies and meshes are tried together, by the sum of what they cost, each with
    the fewest micro-batches that fit, at two compilations of the update where none do; the other programs change with the
    mesh alone. Where the config fits, only what recomputes less than it does is looked for, on its own mesh.
    """
    alone: list[str] = []
    while not found.fits and part.seeds > 1:
        part = part.of_seeds(part.seeds // 2)
        alone = [f"seeds_together={part.seeds}"]
        found = _planned(part.stage(ground), compiler, target)
        if found.fits:
            return alone[0], found.peak
    # The programs beside the update, by whether the data axis is given to fsdp.
    beside: dict[bool, dict[str, Row]] = {False: _beside(found), True: {}}
    for policy, split in _by_cost(part.section, found, settings, ground):
        if found.fits and policy == ground.model.remat:
            return None
        if not all(row.fits(target.usable) for row in beside[split].values()):
            continue
        changed = split or policy != ground.model.remat
        mesh = settings.mesh.model_copy(update={"data": 1, "fsdp": -1} if split else {})
        model = {**settings.model, "remat": policy}
        tried, compile_it = on(model, mesh) if changed else (ground, compiler)
        try:
            checks.check_rows(part.section, tried)
        except ValueError:
            continue
        fitting = _fewest_slices(part, tried, compile_it, target, beside[split])
        if fitting is not None:
            slices, planned = fitting
            changes = {
                f"model.remat={policy}": policy != ground.model.remat,
                "mesh.data=1 mesh.fsdp=-1": split,
                f"num_microbatches={slices}": slices != _slices(part.section, tried)[0],
            }
            made = [text for text, differs in changes.items() if differs]
            return " ".join([*alone, *made]), planned.peak
    return None


def _by_cost(
    section: config.Recipe,
    found: Planned,
    settings: config.RunConfig | config.StudyConfig,
    ground: Ground,
) -> list[tuple[str, bool]]:
    """(remat, whether the data axis is given to fsdp), the cheapest first."""
    policies = REMAT if found.stage.batch is not None else (ground.model.remat,)
    may_split = not found.fits and ground.mesh.shape["data"] > 1
    samples = hasattr(section, "rewards") or hasattr(section, "on_policy_prompts")
    gathers = samples and not settings.mesh.gather_for_sampling
    of_split = SPLIT_SAMPLING if gathers else SPLIT
    return sorted(
        itertools.product(policies, (False, True) if may_split else (False,)),
        key=lambda each: RECOMPUTED[each[0]] + of_split * each[1],
    )


def _beside(planned: Planned) -> dict[str, Row]:
    """The programs that neither remat nor micro-batches change, by name."""
    rows = {row.program.name: row for row in planned.rows}
    return {name: row for name, row in rows.items() if name != "train step"}


def _fewest_slices(
    part: Part,
    ground: Ground,
    compiler: Callable[[Program], Compiled],
    target: Target,
    beside: dict[str, Row],
) -> tuple[int | None, Planned] | None:
    """The fewest micro-batches that fit, and what they take; None where the most do not fit.

    Args:
      part, ground, compiler, target: what is planned.
      beside: of `_beside` on this mesh; filled where it is empty.
    """

    def planned(slices: int | None) -> Planned:
        changes = {} if slices is None else {"num_microbatches": slices}
        made = _planned(part.stage(ground, **changes), compiler, target, beside)
        beside.update(_beside(made))
        return made

    given, *more = _slices(part.section, ground)
    if more and not planned(given).fits and not planned(more[-1]).fits:
        return None
    for slices in (given, *more):
        if (made := planned(slices)).fits:
            return slices, made
    return None


def _slices(section: config.Recipe, ground: Ground) -> list[int | None]:
    """Numbers of micro-batches from the config's on, doubled as long as the batch divides; [None] where it has none."""
    given = getattr(section, "num_microbatches", None)
    rows = section.batch_rows
    if given is None or rows is None:
        return [given]
    coupled = isinstance(section, config.DpoSection) and losses.couples_rows(
        dpo.make_loss(section)
    )
    apart = getattr(section, "on_policy_prompts", rows) != rows
    if coupled or apart:
        return [given]
    shards = sharding.batch_shards(ground.mesh)
    found = [given]
    while rows % (2 * found[-1] * shards) == 0:
        found.append(2 * found[-1])
    return found


def _largest_batch(
    part: Part,
    ground: Ground,
    compiler: Callable[[Program], Compiled],
    target: Target,
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

"""From what the stages of a measurement left to numbers with intervals, and from those to advice."""

import inspect
from collections.abc import Mapping

from gvjax import config
from gvjax.gap import gathering, judging, stages
from gvjax.gap.advice import Advice, Margins, Tier1, Tier2, advise
from gvjax.gap.bounds import Bounds
from gvjax.gap.choices import add_choices, add_sizes
from gvjax.gap.findings import (
    ChoiceCurve,
    GapFindings,
    Multiplier,
    Quantity,
    SeedValues,
    TaskFinding,
)
from gvjax.gap.judging import Judged
from gvjax.gap.likelihoods import add_likelihoods
from gvjax.gap.measurement import GapPlan, MeasuredScene
from gvjax.gap.numbers import (
    ADVANTAGE,
    CUES,
    DIFFERENCE,
    EFFICIENCY,
    HEADROOM,
    LEAD,
    LENGTH,
    MATCHED,
    NULL_LEAD,
    ORACLE,
    PEAK,
    SLOPE,
    TURN,
    Numbers,
)
from gvjax.gap.pilot import add_pilot, onsets
from gvjax.gap.results import StudyResults
from gvjax.gap.stages import Store


def weigh(settings: config.GapConfig, plan: GapPlan, store: Store) -> GapFindings:
    """The findings of a measurement whose stages are all done.

    Args:
      settings: the measurement.
      plan: its stages.
      store: their results.

    Raises:
      LabelsWanted, JudgeError: see `judging.judge`.
    """
    tasks = []
    advice: Advice | None = None
    for number in range(len(plan.tasks)):
        task, its_advice = _task(settings, plan, store, number)
        tasks.append(task)
        advice = advice or its_advice
    assert advice is not None
    return GapFindings(
        name=settings.gap,
        config=config.resolved(settings),
        config_hash=config.config_hash(settings),
        versions=stages.versions_behind(plan.stages, store),
        started=store.started(),
        seeds=settings.seeds,
        tasks=tuple(tasks),
        advice=advice,
    )


def pilot_results(
    settings: config.GapConfig, plan: GapPlan, store: Store, number: int
) -> StudyResults | None:
    """Both roads on a task, where they were taken."""
    if not config.has_pilot(settings, number):
        return None
    study = config.study_of(settings, number)
    return gathering.gather(study, plan.tasks[number], store)


def _task(
    settings: config.GapConfig,
    plan: GapPlan,
    store: Store,
    number: int,
) -> tuple[TaskFinding, Advice]:
    scenes = [
        MeasuredScene(settings, plan.tasks[number], store, seed=seed, number=number)
        for seed in settings.seeds
    ]
    numbers = Numbers(settings.seeds)
    found, curves, multiplier = add_likelihoods(settings, scenes, numbers)
    choices: tuple[ChoiceCurve, ...] = ()
    chosen_n = None
    if scenes[0].task.reward_range is not None:
        choices, chosen_n = add_choices(settings, scenes, numbers)
        if number == 0:
            add_sizes(settings, scenes, chosen_n, numbers)
    pilot = pilot_results(settings, plan, store, number)
    falls: dict[str, SeedValues] = {}
    judged: Judged | None = None
    if pilot is not None:
        judged = judging.judge(settings, plan, store, number, pilot.tasks[0])
        falls = onsets(pilot.tasks[0], settings.evaluation.validation_prompts)
        add_pilot(settings, pilot.tasks[0], judged, numbers)
    bounds, made = numbers.quantities()
    advice = _advice(settings, bounds, made, multiplier, judged)
    task = scenes[0].task
    return (
        TaskFinding(
            task=config.gap_tasks(settings)[number].name,
            role="control" if number else "main",
            prompts=gathering.prompts_of(scenes[0].task),
            description=(inspect.getdoc(inspect.getmodule(type(task))) or "").split(
                "\n"
            )[0],
            quantities=tuple(made.values()),
            scorers=found,
            curves=curves,
            multiplier=multiplier,
            choices=choices,
            chosen_n=chosen_n,
            pilot=pilot,
            onsets=falls,
            judge=None if judged is None else judged.finding,
        ),
        advice,
    )


def _advice(
    settings: config.GapConfig,
    bounds: Mapping[str, Bounds],
    made: Mapping[str, Quantity],
    multiplier: Multiplier | None,
    judged: Judged | None,
) -> Advice:
    seeds = len(settings.seeds)

    def beside(name: str) -> Bounds | None:
        """Of numbers that decide nothing: their plain intervals."""
        quantity = made.get(name)
        if quantity is None or quantity.estimate is None:
            return None
        return Bounds(quantity.estimate, quantity.low, quantity.high)

    one = Tier1(
        seeds,
        advantage=bounds.get(ADVANTAGE),
        headroom=bounds.get(HEADROOM),
        lead=bounds.get(LEAD),
        oracle=bounds.get(ORACLE),
        efficiency=bounds.get(EFFICIENCY),
        turn=bounds.get(TURN),
        slope=bounds.get(SLOPE),
        data_multiplier_identified=None
        if multiplier is None
        else multiplier.identified,
        peak_distance=beside(PEAK),
        length_share=beside(LENGTH),
        null_lead=beside(NULL_LEAD),
        cue_drop=beside(CUES),
    )
    two = None
    warnings: tuple[str, ...] = ()
    if judged is not None:
        two = Tier2(
            seeds,
            difference=bounds.get(DIFFERENCE),
            matched_kl=bounds.get(MATCHED),
            unmatched=made[MATCHED].reason if MATCHED in made else "",
        )
        warnings = judged.finding.warnings
    margins = settings.margins
    return advise(
        one,
        two,
        margins=Margins(
            winrate=margins.winrate,
            nats=margins.nats,
            low_efficiency=margins.low_efficiency,
            nats_per_doubling=margins.nats_per_doubling,
        ),
        judge_warnings=warnings,
    )

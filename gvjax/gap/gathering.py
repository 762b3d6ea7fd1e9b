"""What the finished stages of a study add up to."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gvjax import config
from gvjax.gap import contrasts, spending
from gvjax.gap.performing import Scene
from gvjax.gap.planning import Plan, arms_of, ground_for, task_sections
from gvjax.gap.results import (
    ArmResult,
    BestOfN,
    Contrast,
    CurvePoint,
    Ledger,
    Road,
    Sample,
    ScorerResult,
    ScorerSeed,
    SeedResult,
    StudyResults,
    TaskResult,
)
from gvjax.gap.stages import Store, versions_behind
from gvjax.gap.statistics import Prompts
from gvjax.recipes.dataset import Dataset
from gvjax.recipes.ground import Ground, task_of
from gvjax.tasks.task import Task

START = "SFT"


def gather(study: config.StudyConfig, plan: Plan, store: Store) -> StudyResults:
    """The results of a study whose stages are all done, with its declared contrasts analysed."""
    ground = ground_for(study)
    results = StudyResults(
        name=study.study,
        config=config.resolved(study),
        config_hash=config.config_hash(study),
        versions=versions_behind(plan.stages, store),
        started=store.started(),
        tasks=tuple(
            _gather_task(study, plan, store, ground, number)
            for number in range(len(task_sections(study)))
        ),
        contrasts=tuple(
            Contrast(
                task=declared.task or study.task.name,
                a=START if declared.a == "sft" else declared.a,
                b=START if declared.b == "sft" else declared.b,
                margin=declared.margin,
                primary=declared.primary,
            )
            for declared in study.contrasts
        ),
    )
    return contrasts.analyse(results)


def prompts_of(task: Task) -> Prompts:
    """How the test prompts and held-out pairs of a task's seeds lie: those of a dataset are the same rows for all seeds."""
    return "crossed" if isinstance(task, Dataset) else "nested"


def _gather_task(
    study: config.StudyConfig, plan: Plan, store: Store, ground: Ground, number: int
) -> TaskResult:
    section = task_sections(study)[number]
    arms = arms_of(study, number)

    def result(kind, seed, arm="", trial=0):
        return store.result(plan.of(kind, seed, number, arm, trial))

    start = ArmResult(
        START,
        "start",
        tuple(_seed_result(seed, result("pairs", seed)) for seed in study.seeds),
        "supervised fine-tuning, where every arm begins",
    )
    gathered = [start]
    scorers: dict[str, list[ScorerSeed]] = {"reward model": []}
    chosen: dict[tuple[str, int], dict[str, Any]] = {}
    for name, arm in arms.items():
        tried = config.arm_settings(arm)
        seeds = []
        for seed in study.seeds:
            trials = [result("trial", seed, name, trial) for trial in range(len(tried))]
            best = max(range(len(tried)), key=lambda trial: trials[trial]["validation"])
            chosen[name, seed] = trials[best]
            ledger = _ledger(study, ground, name, functools.partial(result, seed=seed))
            setting = _differences(tried[best], arm) if arm.sweep else {}
            seeds.append(
                _seed_result(seed, trials[best], setting=setting, ledger=ledger)
            )
        borrows = arm.road == "offline" and arm.data != "pairs"
        road: Road = "relabelled" if borrows else arm.road
        gathered.append(ArmResult(name, road, tuple(seeds), _describe(arm)))
    for seed in study.seeds:
        scorers["reward model"].append(_scorer_seed(seed, result("reward", seed)))
        offline = [
            (name, chosen[name, seed])
            for name, arm in arms.items()
            if "scorer" in chosen[name, seed] and arm.data == "pairs"
        ]
        if offline:
            best_scorer = max(offline, key=lambda e: e[1]["scorer"]["log_likelihood"])
            scorers.setdefault("DPO implicit reward", []).append(
                _scorer_seed(seed, best_scorer[1])
            )
    described = {
        "reward model": "trained on the pairs, at its own scale",
        "DPO implicit reward": "of the offline arm that predicts best, each at its best β on these very pairs",
    }
    task = task_of(section, study.seeds[0])
    optima = []
    for seed in study.seeds:
        scene = Scene(study, plan, store, seed=seed, task_number=number)
        optimum = scene.task.optimum(scene.test_prompts)
        optima.append(math.nan if optimum is None else float(np.mean(optimum)))
    seed = study.seeds[0]
    shown = {START: result("pairs", seed), **{a: chosen[a, seed] for a in arms}}
    return TaskResult(
        task=section.name,
        role="twin" if number else "main",
        arms=tuple(gathered),
        prompts=prompts_of(task),
        scorers=tuple(
            ScorerResult(name, tuple(seeds), described[name])
            for name, seeds in scorers.items()
        ),
        best_of_n=tuple(
            BestOfN(
                name,
                tuple(study.best_of_n),
                tuple(
                    tuple(result("curves", seed)["best_of_n"][name])
                    for seed in study.seeds
                ),
            )
            for name in (("gold", "reward model") if study.best_of_n else ())
        ),
        samples=tuple(
            Sample(
                prompt=shown[START]["samples"][row][0],
                completions={n: r["samples"][row][1] for n, r in shown.items()},
                gold={n: r["gold"][row] for n, r in shown.items()},
            )
            for row in range(len(shown[START]["samples"]))
        ),
        optimum=None if math.isnan(np.mean(optima)) else float(np.mean(optima)),
        description=(inspect.getdoc(inspect.getmodule(type(task))) or "").split("\n")[
            0
        ],
    )


def _ledger(
    study: config.StudyConfig,
    ground: Ground,
    name: str,
    result: Callable[..., dict[str, Any]],
) -> Ledger:
    """What an arm of one seed spent: its own trials and those of the arm it starts from, and once what all of them read.

    Args:
      study: the study.
      ground: its network.
      name: of the arm.
      result: of a kind of stage, of an arm and a trial.
    """
    arms = {each: study.arms[each] for each in (study.arms[name].start, name) if each != "sft"}  # fmt: skip
    count = study.pairs.count

    def timed(ledger: Ledger, kind: str, **place) -> Ledger:
        return dataclasses.replace(ledger, seconds=result(kind, **place)["seconds"])

    total = Ledger()
    for each, arm in arms.items():
        ranks = config.needs_ranked_samples(arm)
        more = (
            study.augmentation.prompts if arm.data == "augmented" and not ranks else 0
        )
        for trial, settings in enumerate(config.arm_settings(arm)):
            spent = spending.spent(settings, ground, count + more)
            if arm.data == "relabelled":
                spent += spending.scored(ground, 2 * count)
            total += timed(spent, "trial", arm=each, trial=trial)
    if any(_uses_reward_model(arm) for arm in arms.values()):
        total += timed(spending.spent(study.reward, ground, count), "reward")
    if any(config.needs_ranked_samples(arm) for arm in arms.values()):
        total += timed(spending.ranked(study.augmentation, ground), "augmented")
    # All of them read the same labels: they are bought once.
    return dataclasses.replace(total, labels=count if total.labels else 0)


def _seed_result(
    seed: int,
    found: Mapping[str, Any],
    *,
    setting: dict[str, Any] | None = None,
    ledger: Ledger | None = None,
) -> SeedResult:
    return SeedResult(
        seed=seed,
        gold=tuple(found["gold"]),
        kl=found["kl"],
        length=found["length"],
        step=found.get("round", 0),
        setting=setting or {},
        curve=tuple(
            CurvePoint(
                int(p["round"]),
                p["gold"],
                p["kl"],
                p["length"],
                p.get("winrate"),
                p.get("proxy"),
            )
            for p in found.get("curve", ())
        ),
        ledger=ledger or Ledger(),
        extra={"validation_gold": found["validation"]} if "validation" in found else {},
    )


def _scorer_seed(seed: int, found: Mapping[str, Any]) -> ScorerSeed:
    scorer = found["scorer"]
    return ScorerSeed(
        seed,
        scorer["log_likelihood"],
        scorer["accuracy"],
        scorer["calibration_error"],
        tuple(scorer["pair_log_likelihoods"]),
        scorer["gold_accuracy"],
    )


def _uses_reward_model(arm: config.ArmSection) -> bool:
    if arm.road == "offline" and arm.data != "pairs":
        return True
    sources = [getattr(each, "rewards", None) for each in config.arm_settings(arm)]
    return any(each is not None and each.reward_model > 0 for each in sources)


def _differences(settings: config.Section, arm: config.ArmSection) -> dict[str, Any]:
    """The fields in which the sweep's entries differ, with their values in the chosen one."""
    flat = [_flat(each.model_dump()) for each in config.arm_settings(arm)]
    here = _flat(settings.model_dump())
    return {
        name: value
        for name, value in here.items()
        if len({str(each[name]) for each in flat}) > 1
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            made.update(_flat(value, f"{prefix}{name}."))
        else:
            made[prefix + name] = value if not isinstance(value, tuple) else str(value)
    return made


def _describe(arm: config.ArmSection) -> str:
    tried = len(config.arm_settings(arm))
    what = arm.settings.recipe.replace("_", " ")
    if isinstance(arm.settings, config.PolicyGradientSection):
        what = arm.settings.algorithm
    data = {
        "pairs": "",
        "augmented": ", on further prompts too",
        "relabelled": ", on the pairs' completions as the reward model labels them",
    }[arm.data]
    if config.needs_ranked_samples(arm):
        data = ", on the pairs and samples that the reward model ranked"
    if arm.settings.recipe == "best_of_n":
        data += ", nothing trained"
    start = "" if arm.start == "sft" else f", from {arm.start}"
    sweep = f"; best of {tried} settings on validation gold" if tried > 1 else ""
    kept = {
        "best": "; best checkpoint on validation gold",
        "last": "; last checkpoint",
    }[arm.select]
    if arm.settings.recipe == "best_of_n":
        kept = ""
    return f"{what}{data}{start}{kept}{sweep}"

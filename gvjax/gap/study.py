"""The comparison of both roads: which stages a study has, how each is done, and what they add up to.

For every seed: the SFT policy, then for the main task and each twin the labelled pairs, the reward model, and one trial
for each setting of each arm. All arms of a seed share the SFT policy, the pairs, the network, the optimizer family, the
prompts and the random numbers of evaluation.
"""

import dataclasses
import functools
import importlib.metadata
import inspect
import logging
import math
import platform
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from scipy import special

from gvjax import config
from gvjax.gap import contrasts, spending, statistics
from gvjax.gap.results import (
    ArmResult,
    BestOfN,
    Contrast,
    CurvePoint,
    Ledger,
    Sample,
    ScorerResult,
    ScorerSeed,
    SeedResult,
    StudyResults,
    TaskResult,
)
from gvjax.gap.stages import Report, Stage, Store
from gvjax.recipes import (
    best_of_n,
    loop,
    reward,
    sft,
    single,
)
from gvjax.recipes.evaluation import evaluate_margins, evaluate_policy
from gvjax.recipes.ground import (
    Ground,
    cached,
    completions_of,
    ground_of,
    reward_all,
    role_key,
    role_rng,
    sample_all,
    score_all,
    task_of,
)
from gvjax.recipes.inputs import Inputs
from gvjax.recipes.pairs import (
    Pairs,
    implicit_margins,
    joined,
    ranked_pairs,
    sampled_pairs,
)
from gvjax.recipes.rewards import RewardModel, make_rewards
from gvjax.tasks.task import Task
from gvjax.types import Params, SequenceBatch

logger = logging.getLogger(__name__)

START = "SFT"
SAMPLES_SHOWN = 4


# What there is to do.


@dataclasses.dataclass(frozen=True)
class Plan:
    """The stages of a study.

    Attributes:
      stages: all of them, parents before children.
      by_place: (kind, seed, task, arm, trial) -> Stage.
    """

    stages: tuple[Stage, ...]
    by_place: Mapping[tuple[Any, ...], Stage]

    def of(self, kind: str, seed: int, task: int = 0, arm: str = "", trial: int = 0):
        """The stage at a place."""
        return self.by_place[kind, seed, task, arm, trial]


def task_sections(study: config.StudyConfig) -> list[config.TaskSection]:
    """The main task, then the twins'."""
    return [study.task, *(twin.task for twin in study.twins)]


def arms_of(study: config.StudyConfig, task: int) -> dict[str, config.ArmSection]:
    """The arms run on the main task (0) or on a twin (1, 2, ...)."""
    names = study.twins[task - 1].arms if task else None
    return {
        name: arm for name, arm in study.arms.items() if names is None or name in names
    }


def check(study: config.StudyConfig) -> None:
    """Refuses what a stage would fail on later, before anything is compiled.

    Raises:
      ConfigError: a task, the network, a twin, a loss, a verifier or a size does not fit.
    """
    ground = ground_for(study)
    single.check(study.sft, ground)
    single.check(study.reward, ground)
    for name, arm in study.arms.items():
        for settings in config.arm_settings(arm):
            try:
                single.check(settings, ground)
            except config.ConfigError as error:
                raise config.ConfigError(f"arms.{name}: {error}") from None


def ground_for(study: config.StudyConfig) -> Ground:
    """The network and layout all seeds and twins share.

    Raises:
      ConfigError: a twin has another vocabulary or other lengths than the main task.
    """
    made = [task_of(section, study.seeds[0]) for section in task_sections(study)]
    grounds = [ground_of(task, study.model, study.mesh) for task in made]
    for section, ground in zip(task_sections(study), grounds):
        if ground != grounds[0]:
            raise config.ConfigError(
                f"twin {section.name} does not have the main task's vocabulary and lengths, so it cannot share its SFT"
                " policy; make it a study of its own"
            )
    return grounds[0]


def plan_of(study: config.StudyConfig, code: str) -> Plan:
    """Every stage of a study, in an order in which they can be done.

    Args:
      study: the study.
      code: fingerprint of the code that will do it, as the process that leads the study sees it.
    """
    ground = ground_for(study)
    stages: list[Stage] = []
    by_place: dict[tuple[Any, ...], Stage] = {}
    shared = {"model": study.model, "evaluation": study.evaluation.model_dump()}

    def add(kind, seed, task, arm, trial, label, inputs: dict[str, Any], parents, cost):
        name = task_sections(study)[task].name
        if kind == "sft":
            place = {"task": study.task.model_dump(), "seed": seed}
        else:
            section = task_sections(study)[task]
            place = {"task": section.model_dump(), "seed": seed}
        stage = Stage(
            kind=kind,
            place=(seed, task, arm, trial),
            label=f"{name} seed {seed}: {label}",
            inputs={**shared, **place, **inputs},
            parents=tuple(parents),
            cost=cost,
            code=code,
        )
        stages.append(stage)
        by_place[kind, seed, task, arm, trial] = stage
        return stage

    def cost(settings) -> float:
        return spending.spent(settings, ground, study.pairs.count).flops

    for seed in study.seeds:
        settings = {"settings": study.sft.model_dump()}
        start = add("sft", seed, 0, "", 0, "SFT", settings, (), cost(study.sft))
        for task in range(len(task_sections(study))):
            few = 4 * spending.forward_flops(
                ground, study.pairs.count * ground.completion_length
            )
            inputs: dict[str, Any] = {"pairs": study.pairs.model_dump()}
            pairs = add("pairs", seed, task, "", 0, "pairs", inputs, (start,), few)
            inputs = {"settings": study.reward.model_dump()}
            needed = (start, pairs)
            verifier = add(
                "reward",
                seed,
                task,
                "",
                0,
                "reward model",
                inputs,
                needed,
                cost(study.reward),
            )
            arms = arms_of(study, task)
            extra: tuple[Stage, ...] = ()
            if any(arm.data == "augmented" for arm in arms.values()):
                inputs = {"augmentation": study.augmentation.model_dump()}
                drawn = (
                    study.augmentation.prompts * study.augmentation.samples_per_prompt
                )
                flops = 2 * spending.forward_flops(
                    ground, drawn * ground.completion_length
                )
                extra = (
                    add(
                        "augmented",
                        seed,
                        task,
                        "",
                        0,
                        "more pairs",
                        inputs,
                        (*needed, verifier),
                        flops,
                    ),
                )
            if study.best_of_n:
                inputs = {"n": list(study.best_of_n)}
                flops = spending.forward_flops(
                    ground,
                    study.evaluation.test_prompts
                    * max(study.best_of_n)
                    * ground.completion_length
                    * 4,
                )
                add(
                    "curves",
                    seed,
                    task,
                    "",
                    0,
                    "best-of-n",
                    inputs,
                    (*needed, verifier),
                    flops,
                )
            # Arms that start from another arm come after it.
            for name, arm in sorted(
                arms.items(), key=lambda item: item[1].start != "sft"
            ):
                parents = [*needed, verifier]
                if arm.data == "augmented":
                    parents += extra
                if arm.start != "sft":
                    trials = len(config.arm_settings(arms[arm.start]))
                    parents += [
                        by_place["trial", seed, task, arm.start, trial]
                        for trial in range(trials)
                    ]
                for trial, tried in enumerate(config.arm_settings(arm)):
                    inputs = {
                        "settings": tried.model_dump(),
                        "select": arm.select,
                        "data": arm.data,
                        "start": arm.start,
                    }
                    label = f"{name} {trial + 1}" if arm.sweep else name
                    add(
                        "trial",
                        seed,
                        task,
                        name,
                        trial,
                        label,
                        inputs,
                        parents,
                        cost(tried),
                    )
    # All SFT policies first: then there is always something to do for every process.
    order = {"sft": 0, "pairs": 1, "reward": 1, "augmented": 2, "trial": 2, "curves": 3}
    ordered = sorted(stages, key=lambda stage: order[stage.kind])
    return Plan(tuple(ordered), by_place)


# How each stage is done.


def perform(
    study: config.StudyConfig, stage: Stage, store: Store, report: Report
) -> Mapping[str, Any]:
    """Does one stage of a study, in whichever process."""
    plan = _plan(study, stage.code)
    seed, task_number, arm, trial = stage.place
    scene = Scene(study, plan, store, seed=seed, task_number=task_number)
    run = loop.Run(
        store.directory(stage), {"stage": stage.key}, study.logging, progress=report
    )
    kind = stage.kind
    if kind == "sft":
        return scene.do_sft(run)
    if kind == "pairs":
        return scene.do_pairs(run)
    if kind == "reward":
        return scene.do_reward(run)
    if kind == "augmented":
        return scene.do_augmented(run)
    if kind == "curves":
        return scene.do_curves()
    return scene.do_trial(run, arm=arm, trial=trial)


@cached
def _plan(study: config.StudyConfig, code: str) -> Plan:
    return plan_of(study, code)


class Scene:
    """One seed on one task: reads what earlier stages left, does the next."""

    def __init__(
        self,
        study: config.StudyConfig,
        plan: Plan,
        store: Store,
        *,
        seed: int,
        task_number: int,
    ):
        self.study = study
        self.plan = plan
        self.store = store
        self.seed = seed
        self.number = task_number
        self.task = task_of(task_sections(study)[task_number], seed)
        self.ground = _ground(study)
        counts = study.pairs, study.evaluation
        rng = role_rng(seed, "prompts")
        self.train_prompts = self.task.prompts(rng, counts[0].count, "train")
        self.validation_prompts = self.task.prompts(
            rng, counts[1].validation_prompts, "validation"
        )
        self.test_prompts = self.task.prompts(rng, counts[1].test_prompts, "test")

    def directory(
        self, kind: str, task: int | None = None, arm: str = "", trial: int = 0
    ):
        number = self.number if task is None else task
        return self.store.directory(self.plan.of(kind, self.seed, number, arm, trial))

    @functools.cached_property
    def policy(self) -> Params:
        """The SFT policy."""
        return loop.load_params(self.directory("sft", 0), self.ground.policy_shapes())

    @functools.cached_property
    def reward_model(self) -> RewardModel:
        """The trained verifier."""
        params = loop.load_params(
            self.directory("reward"), self.ground.reward_model_shapes()
        )
        return RewardModel(params, self.study.reward.pooling)

    def pairs(self, which: str) -> Pairs:
        """`train`, `validation` or `test` pairs."""
        return Pairs.load(self.directory("pairs") / f"{which}.npz")

    def inputs(self, **more) -> Inputs:
        """The equal footing of this seed and task."""
        fields = {
            "ground": self.ground,
            "task": self.task,
            "seed": self.seed,
            "policy": self.policy,
            "reference": self.policy,
            "prompts": self.train_prompts,
            "validation": self.validation_prompts,
            "pairs": self.pairs("train"),
            "heldout": self.pairs("validation"),
        }
        return Inputs(**{**fields, **more})

    def do_sft(self, run: loop.Run) -> dict[str, Any]:
        trained = sft.train(self.study.sft, self.ground, self.task, self.seed, run)
        loop.save_params(run.directory, trained.params)
        return {}

    def do_pairs(self, run: loop.Run) -> dict[str, Any]:
        run.directory.mkdir(parents=True, exist_ok=True)
        rng = role_rng(self.seed, "held-out prompts")
        heldout = self.study.pairs.heldout
        for which, prompts in (
            ("train", self.train_prompts),
            ("validation", self.task.prompts(rng, heldout, "validation")),
            ("test", self.task.prompts(rng, heldout, "test")),
        ):
            made = sampled_pairs(
                self.ground,
                self.task,
                self.policy,
                prompts,
                seed=self.seed,
                role=f"pairs/{which}",
                tau=self.study.pairs.tau,
            )
            made.save(run.directory / f"{which}.npz")
        return self._judged(self.policy)

    def do_reward(self, run: loop.Run) -> dict[str, Any]:
        trained = reward.train(self.study.reward, self.inputs(), run)
        loop.save_params(run.directory, trained.params)
        test = self.pairs("test")
        margins = reward.reward_margins(
            self.ground, self.study.reward, trained.params, test
        )
        return {
            "round": trained.round,
            "curve": trained.curve,
            "scorer": _scorer(margins, test, fit_scale=False),
        }

    def do_augmented(self, run: loop.Run) -> dict[str, Any]:
        run.directory.mkdir(parents=True, exist_ok=True)
        section = self.study.augmentation
        rng = role_rng(self.seed, "augmentation prompts")
        prompts = self.task.prompts(rng, section.prompts, "train")
        made = ranked_pairs(
            self.ground,
            self.task,
            self.policy,
            prompts,
            make_rewards(
                self.ground, config.RewardSources(), self.task, self.reward_model
            ),
            samples_per_prompt=section.samples_per_prompt,
            seed=self.seed,
            role="augmentation",
        )
        made.save(run.directory / "augmented.npz")
        return {}

    def do_curves(self) -> dict[str, Any]:
        """Gold of the best of n samples of the SFT policy, as chosen by gold and by the reward model."""
        largest = max(self.study.best_of_n)
        count = 2 * largest
        prompts = self.test_prompts.take(slice(0, 200))
        rollouts = sample_all(
            self.ground,
            self.policy,
            prompts,
            role_key(self.seed, "best of n"),
            num_samples=count,
        )
        completions = completions_of(rollouts, self.ground.completion_length)
        gold = self.task.reward(prompts.repeat(count), completions)
        rows = SequenceBatch(rollouts.tokens, rollouts.completion_mask)
        model = self.reward_model
        learned = reward_all(self.ground, model.pooling, model.params, rows)
        shape = (len(prompts), count)
        return {
            "best_of_n": {
                name: [
                    float(
                        statistics.best_of_n(
                            scores.reshape(shape), gold.reshape(shape), n
                        ).mean()
                    )
                    for n in self.study.best_of_n
                ]
                for name, scores in (("gold", gold), ("reward model", learned))
            }
        }

    def do_trial(self, run: loop.Run, *, arm: str, trial: int) -> dict[str, Any]:
        section = self.study.arms[arm]
        settings = config.arm_settings(section)[trial]
        inputs = self.inputs(reward_model=self.reward_model)
        if section.data == "augmented":
            more = Pairs.load(self.directory("augmented") / "augmented.npz")
            inputs = dataclasses.replace(
                inputs, pairs=joined(inputs.required_pairs(), more)
            )
        if section.start != "sft":
            inputs = self._from_arm(inputs, section.start)
        if isinstance(settings, config.BestOfNSection):
            judged = best_of_n.evaluate(
                settings, inputs, self.test_prompts, role="test"
            )
            return {
                "round": 0,
                "curve": [],
                "validation": 0.0,
                **_numbers(judged, self),
            }
        trained = single.TRAIN[settings.recipe](
            settings, inputs, run, select=section.select
        )
        loop.save_params(run.directory, trained.params)
        chosen = next(
            point for point in trained.curve if point["round"] == trained.round
        )
        result = {
            "round": trained.round,
            "curve": trained.curve,
            "validation": chosen["gold"],
            **self._judged(trained.params),
        }
        if section.road == "offline":
            test = self.pairs("test")
            margins = implicit_margins(self.ground, trained.params, test)
            result["scorer"] = _scorer(margins, test, fit_scale=True)
        return result

    def _from_arm(self, inputs: Inputs, arm: str) -> Inputs:
        """The inputs with the policy that an arm ended with, chosen among its trials on validation prompts."""
        trials = len(config.arm_settings(self.study.arms[arm]))
        results = [
            self.store.result(self.plan.of("trial", self.seed, self.number, arm, trial))
            for trial in range(trials)
        ]
        best = max(range(trials), key=lambda trial: results[trial]["validation"])
        directory = self.directory("trial", arm=arm, trial=best)
        policy = loop.load_params(directory, self.ground.policy_shapes())
        pairs = inputs.required_pairs()
        chosen, rejected = pairs.sequences(self.ground.pad_id)
        pairs = dataclasses.replace(
            pairs,
            ref_chosen_logps=score_all(self.ground, policy, chosen),
            ref_rejected_logps=score_all(self.ground, policy, rejected),
        )
        return dataclasses.replace(inputs, policy=policy, pairs=pairs)

    def _judged(self, params: Params) -> dict[str, Any]:
        judged = evaluate_policy(
            self.ground,
            self.task,
            params,
            self.policy,
            self.test_prompts,
            seed=self.seed,
            role="test",
        )
        return _numbers(judged, self)


def _numbers(judged, scene: Scene) -> dict[str, Any]:
    shown = scene.test_prompts.take(slice(0, SAMPLES_SHOWN))
    return {
        "gold": [float(value) for value in judged.gold],
        "kl": float(judged.kl.mean()),
        "length": float(judged.completions.lengths.mean()),
        "samples": [
            [
                _shown(scene.task, shown, row),
                _shown(scene.task, judged.completions, row),
            ]
            for row in range(len(shown))
        ],
    }


def _shown(task: Task, rows, row: int) -> str:
    return task.decode(rows.tokens[row][: rows.lengths[row]])


def _scorer(margins: np.ndarray, pairs: Pairs, *, fit_scale: bool) -> dict[str, Any]:
    gold = pairs.chosen_gold - pairs.rejected_gold
    found = evaluate_margins(margins, gold, fit_scale=fit_scale)
    scaled = found.scale * np.asarray(margins, np.float64)
    return {
        "log_likelihood": found.log_likelihood,
        "accuracy": found.accuracy,
        "gold_accuracy": found.gold_accuracy,
        "scale": found.scale,
        "calibration_error": statistics.expected_calibration_error(
            special.expit(np.concatenate([scaled, -scaled])),
            np.repeat([1.0, 0.0], len(scaled)),
        ),
        "pair_log_likelihoods": statistics.pair_log_likelihoods(scaled).tolist(),
    }


@cached
def _ground(study: config.StudyConfig) -> Ground:
    return ground_for(study)


# What it adds up to.


def gather(study: config.StudyConfig, plan: Plan, store: Store) -> StudyResults:
    """The results of a study whose stages are all done, with its declared contrasts analysed."""
    ground = ground_for(study)
    results = StudyResults(
        name=study.study,
        config=config.resolved(study),
        config_hash=config.config_hash(study),
        versions=versions(),
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


def versions() -> dict[str, str]:
    """Of what computed the numbers, and the device."""
    packages = ("gvjax", "jax", "jaxlib", "flax", "optax", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {
        **found,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }


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
            ledger = Ledger()
            for settings, each in zip(tried, trials):
                ledger += dataclasses.replace(
                    spending.spent(settings, ground, study.pairs.count),
                    seconds=each["seconds"],
                )
            if _uses_reward_model(arm, tried[0]):
                ledger += dataclasses.replace(
                    spending.spent(study.reward, ground, study.pairs.count),
                    seconds=result("reward", seed)["seconds"],
                )
            setting = _differences(tried[best], arm) if arm.sweep else {}
            seeds.append(
                _seed_result(seed, trials[best], setting=setting, ledger=ledger)
            )
        road = "relabelled" if arm.data == "augmented" else arm.road
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
        prompts="nested",
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
            CurvePoint(int(p["round"]), p["gold"], p["kl"], p["length"])
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
        scorer["gold_accuracy"],
        scorer["calibration_error"],
        tuple(scorer["pair_log_likelihoods"]),
    )


def _uses_reward_model(arm: config.ArmSection, settings: config.Section) -> bool:
    rewards = getattr(settings, "rewards", None)
    return arm.data == "augmented" or (rewards is not None and rewards.reward_model > 0)


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
    data = (
        ", on the pairs and samples that the reward model ranked"
        if arm.data == "augmented"
        else ""
    )
    start = "" if arm.start == "sft" else f", from {arm.start}"
    sweep = f"; best of {tried} settings on validation gold" if tried > 1 else ""
    kept = (
        "best checkpoint on validation gold"
        if arm.select == "best"
        else "last checkpoint"
    )
    return f"{what}{data}{start}; {kept}{sweep}"

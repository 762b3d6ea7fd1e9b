"""How each stage of a study is done: it reads what earlier stages left and returns its numbers."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import special

from gvjax import config
from gvjax.gap import statistics
from gvjax.gap.planning import Plan, ground_for, task_sections
from gvjax.gap.stages import Report, Stage, Store
from gvjax.recipes import (
    best_of_n,
    loop,
    reward,
    sft,
    single,
)
from gvjax.recipes.evaluation import evaluate_margins, evaluate_policy
from gvjax.recipes.ground import Ground, cached, task_of
from gvjax.recipes.inputs import Inputs
from gvjax.recipes.pairs import (
    Pairs,
    implicit_margins,
    joined,
    labelled_pairs,
    ranked_pairs,
)
from gvjax.recipes.programs import reward_all, sample_all, score_all
from gvjax.recipes.rewards import RewardModel, make_rewards
from gvjax.recipes.rows import completions_of, role_key, role_rng
from gvjax.tasks.task import Prompts, Task
from gvjax.types import Params, SequenceBatch

SAMPLES_SHOWN = 4


def perform(
    study: config.StudyConfig, plan: Plan, stage: Stage, store: Store, report: Report
) -> Mapping[str, Any]:
    """Does one stage of a study, in whichever process; the plan is the leader's."""
    seed, task_number, arm, trial = stage.place
    scene = Scene(study, plan, store, seed=seed, task_number=task_number)
    run = run_of(study, stage, store, report)
    return scene.do(stage.kind, run, arm=arm, trial=trial)


def run_of(
    settings: config.StudyConfig | config.GapConfig,
    stage: Stage,
    store: Store,
    report: Report,
) -> loop.Run:
    """Where a stage keeps what it makes, and whom it tells."""
    return loop.Run(
        store.directory(stage),
        {"stage": stage.key},
        settings.logging,
        timeouts=settings.timeouts,
        progress=report,
    )


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

    def do(
        self, kind: str, run: loop.Run, *, arm: str, trial: int
    ) -> Mapping[str, Any]:
        """One stage of this seed and task."""
        if kind == "sft":
            return self.do_sft(run)
        if kind == "pairs":
            return self.do_pairs(run)
        if kind == "reward":
            return self.do_reward(run)
        if kind == "augmented":
            return self.do_augmented(run)
        if kind == "curves":
            return self.do_curves()
        return self.do_trial(run, arm=arm, trial=trial)

    def do_sft(self, run: loop.Run) -> dict[str, Any]:
        trained = sft.train(self.study.sft, self.ground, self.task, self.seed, run)
        loop.save_params(run.directory, self.ground.merged(trained.params))
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
            made = labelled_pairs(
                self.ground,
                self.task,
                self.policy,
                prompts,
                seed=self.seed,
                role=f"pairs/{which}",
                tau=self.study.pairs.tau,
                temperature=self.study.pairs.temperature,
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
            "scorer": scorer_numbers(margins, test, fit_scale=False),
        }

    def do_augmented(self, run: loop.Run) -> dict[str, Any]:
        run.directory.mkdir(parents=True, exist_ok=True)
        section = self.study.augmentation
        made = ranked_pairs(
            self.ground,
            self.task,
            self.policy,
            self._more_prompts(),
            make_rewards(
                self.ground, config.RewardSources(), self.task, self.reward_model
            ),
            samples_per_prompt=section.samples_per_prompt,
            seed=self.seed,
            role="augmentation",
        )
        made.save(run.directory / "augmented.npz")
        return {}

    def _more_prompts(self) -> Prompts:
        """The prompts of the augmentation."""
        rng = role_rng(self.seed, "augmentation prompts")
        return self.task.prompts(rng, self.study.augmentation.prompts, "train")

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
        if config.needs_ranked_samples(section):
            more = Pairs.load(self.directory("augmented") / "augmented.npz")
            inputs = dataclasses.replace(
                inputs, pairs=joined(inputs.required_pairs(), more)
            )
        elif section.data == "augmented":
            prompts = self.train_prompts.followed_by(self._more_prompts())
            inputs = dataclasses.replace(inputs, prompts=prompts)
        if section.data == "relabelled":
            inputs = dataclasses.replace(
                inputs, pairs=self._relabelled(inputs.required_pairs())
            )
        if section.start != "sft":
            inputs = self._from_arm(inputs, section.start)
        if isinstance(settings, config.BestOfNSection):
            validated, judged = (
                best_of_n.evaluate(settings, inputs, prompts, role=which)
                for which, prompts in (
                    ("validation", self.validation_prompts),
                    ("test", self.test_prompts),
                )
            )
            return {
                "round": 0,
                "curve": [],
                "validation": validated.summary()["gold"],
                **_numbers(judged, self),
            }
        trained = single.train_policy(settings, inputs, run, select=section.select)
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
            result["scorer"] = scorer_numbers(margins, test, fit_scale=True)
        return result

    def _relabelled(self, pairs: Pairs) -> Pairs:
        """The same completions, labelled by the reward model instead of the gold judge."""
        margins = reward.reward_margins(
            self.ground, self.study.reward, self.reward_model.params, pairs
        )
        return pairs.swapped(margins < 0)

    def _from_arm(self, inputs: Inputs, arm: str) -> Inputs:
        """The inputs with the policy that an arm ended with, chosen among its trials on validation prompts."""
        _, best = self.chosen_trial(arm)
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

    def chosen_trial(self, arm: str) -> tuple[config.Trained, int]:
        """The settings of an arm that did best on validation prompts, and their place in its sweep."""
        tried = config.arm_settings(self.study.arms[arm])
        results = [
            self.store.result(self.plan.of("trial", self.seed, self.number, arm, trial))
            for trial in range(len(tried))
        ]
        best = max(range(len(tried)), key=lambda trial: results[trial]["validation"])
        return tried[best], best

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


def scorer_numbers(
    margins: np.ndarray, pairs: Pairs, *, fit_scale: bool
) -> dict[str, Any]:
    """How well a scorer's margins predict the labels of pairs, as JSON; see `evaluate_margins`."""
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

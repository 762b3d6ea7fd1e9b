"""The stages of a measurement of the gap: those of a study of both roads, and scorers and samples beside them."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gvjax import config
from gvjax.gap import planning, quantities, scorers, spending
from gvjax.gap.performing import Scene, run_of, scorer_numbers
from gvjax.gap.planning import Plan
from gvjax.gap.stages import Report, Stage, Store
from gvjax.recipes import identity, loop, sft
from gvjax.recipes.ground import Ground, task_of
from gvjax.recipes.pairs import Pairs
from gvjax.recipes.programs import sample_all
from gvjax.recipes.rows import completions_of, role_key, role_rng
from gvjax.tasks.task import Completions, Prompts

ORDER = {"sft": 0, "pairs": 1, "scorer": 2, "untrained": 2, "reward": 3}
"""What comes first, so that there is always something to do for every process; everything else follows."""


@dataclasses.dataclass(frozen=True)
class GapPlan:
    """The stages of a measurement.

    Attributes:
      stages: all of them, parents before children; the task number in a stage's place is that of the measurement.
      tasks: the plan of each task, in which it has the number 0.
    """

    stages: tuple[Stage, ...]
    tasks: tuple[Plan, ...]


def check(settings: config.GapConfig) -> None:
    """Refuses what a stage would fail on later, before anything is compiled.

    Raises:
      ConfigError: see `planning.check_parts`.
    """
    for number in range(len(config.gap_tasks(settings))):
        planning.check_parts(config.study_of(settings, number))
    for place in range(len(settings.sizes)):
        try:
            resized_ground(settings, place)
        except config.ConfigError as error:
            raise config.ConfigError(f"sizes.{place}: {error}") from None


def resized_ground(settings: config.GapConfig, place: int) -> Ground:
    """The ground of a network of another size: the config's, with the changes of one entry of `sizes`."""
    model = {**settings.model, **settings.sizes[place]}
    return planning.ground_for(config.study_of(settings, model=model))


def plan_of(settings: config.GapConfig, code: str) -> GapPlan:
    """Every stage of a measurement, in an order in which they can be done; made once, see `planning.plan_of`.

    Args:
      settings: the measurement.
      code: fingerprint of gvjax's own code.
    """
    content = functools.cache(identity.content_of)
    tasks = [
        _task_plan(settings, number, code, content)
        for number in range(len(config.gap_tasks(settings)))
    ]
    stages: dict[str, Stage] = {}
    for number, plan in enumerate(tasks):
        for stage in plan.stages:
            seed, _, arm, trial = stage.place
            placed = dataclasses.replace(stage, place=(seed, number, arm, trial))
            stages.setdefault(stage.key, placed)
    ordered = sorted(stages.values(), key=lambda stage: ORDER.get(stage.kind, 4))
    return GapPlan(tuple(ordered), tuple(tasks))


def sizes_of(settings: config.GapConfig) -> list[int]:
    """How many pairs each point of the learning curves is trained on."""
    return [round(share * settings.pairs.count) for share in settings.scorers.fractions]


def scorer_arm(kind: str, count: int) -> str:
    """Where the stages of a scorer that was trained on so many pairs are found."""
    return f"{kind}, {count} pairs"


def _task_plan(
    settings: config.GapConfig, number: int, code: str, content: identity.Content
) -> Plan:
    study = config.study_of(settings, number)
    ground = planning.ground_for(study)
    section, sizes = settings.scorers, sizes_of(settings)
    name = config.gap_tasks(settings)[number].name
    has_gold = task_of(study.task, settings.seeds[0]).reward_range is not None
    behind_task = planning.content_of_task(study.task, settings.seeds[0], content)
    made: list[Stage] = []
    by_place: dict[tuple[Any, ...], Stage] = {}

    def add(kind, seed, arm, trial, label, inputs: dict[str, Any], parents, cost):
        stage = Stage(
            kind=kind,
            place=(seed, 0, arm, trial),
            label=f"{name} seed {seed}: {label}",
            inputs=inputs,
            parents=tuple(parents),
            cost=cost,
            code=code,
        )
        made.append(stage)
        by_place[kind, seed, 0, arm, trial] = stage
        return stage

    length = ground.prompt_length + ground.completion_length
    rows = 2 * section.steps * section.batch_size
    flops = 3 * spending.forward_flops(ground, rows * length)

    def scorer(kind: config.Trainable, count: int, parents) -> list[Stage]:
        inputs = {
            "kind": kind,
            "count": count,
            "pooling": scorers.pooling_of(kind, section),
            "beta": section.beta if kind == "DPO implicit reward" else None,
            "steps": section.steps,
            "batch_size": section.batch_size,
            "evaluate_every": section.evaluate_every,
        }
        return [
            add(
                "scorer",
                parents[0].place[0],
                scorer_arm(kind, count),
                trial,
                f"{kind}, {count} pairs, lr {rate:g}",
                {**inputs, "learning_rate": rate},
                parents,
                flops,
            )
            for trial, rate in enumerate(section.learning_rates)
        ]

    def verifier(start: Stage, pairs: Stage) -> list[Stage]:
        return scorer(section.verifier, sizes[-1], (start, pairs))

    plan = planning.plan_of(study, code, verifier, content)
    for seed in settings.seeds:
        needed = plan.of("sft", seed), plan.of("pairs", seed)
        full = [stage for stage in made if stage.place[0] == seed]
        for kind in section.trained:
            if kind != section.verifier:
                full += scorer(kind, sizes[-1], needed)
        for count in sizes[:-1]:
            for kind in section.trained[:2]:
                scorer(kind, count, needed)
        work = spending.forward_flops(ground, 4 * settings.pairs.heldout * length)
        add("untrained", seed, "", 0, "gold and null scorers", {}, needed, work)
        if not has_gold:
            # Nobody could say which samples are good.
            continue
        drawn = settings.samples
        inputs = drawn.model_dump(exclude={"quantile", "best_of_n"})
        count = (drawn.prompts + drawn.validation_prompts) * (
            drawn.per_prompt + drawn.opponents
        )
        work = spending.forward_flops(ground, count * length)
        parents = (*needed, *full)
        samples = add(
            "samples", seed, "", 0, "samples", inputs, parents, (2 + len(full)) * work
        )
        for place in range(len(settings.sizes) if number == 0 else 0):
            small = resized_ground(settings, place)
            model = {**settings.model, **settings.sizes[place]}
            inputs = {
                "model": model,
                "weights": identity.weights(model, content),
                "task": settings.task.model_dump(),
                "behind_task": behind_task,
                "seed": seed,
                "settings": settings.sft.model_dump(),
                "seeds_together": settings.seeds_together,
            }
            label = f"network {place + 1} of another size"
            rows = settings.sft.steps * settings.sft.batch_size
            start = add(
                "resized_sft",
                seed,
                "",
                place,
                f"{label}: SFT",
                inputs,
                (),
                3 * spending.forward_flops(small, rows * length),
            )
            inputs = section.model_dump(
                include={"pooling", "learning_rates", "steps", "batch_size", "evaluate_every"}
            )  # fmt: skip
            inputs["best_of_n"] = drawn.best_of_n
            parents = (start, samples, plan.of("reward", seed))
            add(
                "resized", seed, "", place, label, inputs, parents, 2 * flops + 4 * work
            )
    return Plan((*plan.stages, *made), {**plan.by_place, **by_place})


def perform(
    settings: config.GapConfig,
    plan: GapPlan,
    stage: Stage,
    store: Store,
    report: Report,
) -> Mapping[str, Any]:
    """Does one stage of a measurement, in whichever process; the plan is the leader's."""
    seed, number, arm, trial = stage.place
    scene = MeasuredScene(settings, plan.tasks[number], store, seed=seed, number=number)
    run = run_of(settings, stage, store, report)
    return scene.do(stage.kind, run, arm=arm, trial=trial)


class MeasuredScene(Scene):
    """One seed on one task of a measurement; its reward model is the verifier chosen among its tries."""

    def __init__(
        self,
        settings: config.GapConfig,
        plan: Plan,
        store: Store,
        *,
        seed: int,
        number: int,
    ):
        super().__init__(
            config.study_of(settings, number), plan, store, seed=seed, task_number=0
        )
        self.settings = settings

    def do(
        self, kind: str, run: loop.Run, *, arm: str, trial: int
    ) -> Mapping[str, Any]:
        if kind == "scorer":
            return self.do_scorer(run, arm, trial)
        if kind == "untrained":
            return self.do_untrained()
        if kind == "samples":
            return self.do_samples(run)
        if kind == "resized_sft":
            small = resized_ground(self.settings, trial)
            trained = sft.train(self.study.sft, small, self.task, self.seed, run)
            loop.save_params(run.directory, trained.params)
            return {}
        if kind == "resized":
            return self.do_resized(run, trial)
        return super().do(kind, run, arm=arm, trial=trial)

    def do_scorer(self, run: loop.Run, arm: str, trial: int) -> dict[str, Any]:
        """Trains a scorer at one learning rate, and keeps its margins on every set of pairs."""
        inputs = self.plan.of("scorer", self.seed, 0, arm, trial).inputs
        pairs = self.pairs("train").take(slice(inputs["count"]))
        trained = scorers.train(
            inputs["kind"],
            self.settings.scorers,
            self.inputs(pairs=pairs),
            run,
            learning_rate=inputs["learning_rate"],
        )
        loop.save_params(run.directory, trained.params)
        scorer = self._trained(inputs["kind"], trained.params)
        kept = next(p for p in trained.curve if p["round"] == trained.round)
        return {
            "round": trained.round,
            "curve": trained.curve,
            "validation": kept["log_likelihood"],
            "margins": self._margins(scorer),
        }

    def _judged(self, params) -> dict[str, Any]:
        """Nothing where there is no gold reward to judge by."""
        return super()._judged(params) if self.task.reward_range is not None else {}

    def do_untrained(self) -> dict[str, Any]:
        """Margins of the scorers that learn nothing."""
        return {
            "margins": {
                kind: self._margins(self._untrained(kind))
                for kind in scorers.untrained_of(self.task)
            }
        }

    def do_reward(self, run: loop.Run) -> dict[str, Any]:
        """Chooses the verifier among its tries, by the likelihood of validation labels."""
        kind = self.settings.scorers.verifier
        trial, result = self.chosen(kind, sizes_of(self.settings)[-1])
        params = self._params(kind, trial)
        loop.save_params(run.directory, params)
        tries = len(self.settings.scorers.learning_rates)
        arm = scorer_arm(kind, sizes_of(self.settings)[-1])
        test = self.pairs("test")
        margins = np.asarray(result["margins"]["test"])
        return {
            "round": result["round"],
            "curve": result["curve"],
            "scorer": scorer_numbers(margins, test, fit_scale=False),
            "seconds": sum(
                self.store.result(self.plan.of("scorer", self.seed, 0, arm, each))[
                    "seconds"
                ]
                for each in range(tries)
            ),
        }

    def do_samples(self, run: loop.Run) -> dict[str, Any]:
        """Samples of the SFT policy on validation and test prompts, with every scorer's scores and gold rewards."""
        run.directory.mkdir(parents=True, exist_ok=True)
        section, full = self.settings.samples, sizes_of(self.settings)[-1]
        judges = [self._untrained(kind) for kind in scorers.UNTRAINED]
        for kind in self.settings.scorers.trained:
            trial, _ = self.chosen(kind, full)
            judges.append(self._trained(kind, self._params(kind, trial)))
        for which, prompts in (
            ("validation", self.validation_prompts.take(slice(section.validation_prompts))),
            ("test", self.test_prompts.take(slice(section.prompts))),
        ):  # fmt: skip
            count = section.per_prompt + section.opponents
            completions = draw(
                self.ground, self.policy, prompts, count, self.seed, f"samples/{which}"
            )
            repeated = prompts.repeat(count)
            arrays = {
                judge.name: judge.score(repeated, completions) for judge in judges
            }
            arrays["length"] = completions.lengths
            best = self.task.optimum(prompts)
            # Without a gold reward no samples are planned.
            assert self.task.reward_range is not None
            top = self.task.reward_range[1]
            arrays = {
                name: values.reshape(len(prompts), count).astype(np.float32)
                for name, values in arrays.items()
            }
            arrays["optimum"] = np.full(len(prompts), top) if best is None else best
            if jax.process_index() == 0:
                np.savez_compressed(
                    run.directory / f"{which}.npz", allow_pickle=False, **arrays
                )
        return {}

    def do_resized(self, run: loop.Run, place: int) -> dict[str, Any]:
        """A network of another size as the verifier of the policy's samples, and as the policy that samples.

        Returns:
          `verifier` and `policy`: [best_of_n], winrate − ½ over the policy's own samples: of the best of n of the policy's
          samples by a reward model of this size, and of the best of n of this size's samples by the verifier.
        """
        section, settings = self.settings.scorers, self.settings.samples
        small = resized_ground(self.settings, place)
        directory = self.directory("resized_sft", trial=place)
        policy = loop.load_params(directory, small.policy_shapes())
        inputs = self.inputs(ground=small, policy=policy, reference=policy)
        tries = []
        for trial, rate in enumerate(section.learning_rates):
            one = dataclasses.replace(run, directory=run.directory / f"{trial}")
            kind = section.verifier
            tries.append(scorers.train(kind, section, inputs, one, learning_rate=rate))
        best = max(
            tries, key=lambda t: max(point["log_likelihood"] for point in t.curve)
        )
        judge = scorers.trained_scorer(kind, section, small, best.params, policy)
        prompts = self.test_prompts.take(slice(settings.prompts))
        most = settings.per_prompt
        known = self.samples("test")
        opponents = known["gold"][:, most:]

        def drawn(ground: Ground, params, role: str, count: int):
            completions = draw(ground, params, prompts, count, self.seed, role)
            return prompts.repeat(count), completions

        def gains(scores: np.ndarray, gold: np.ndarray, count: int) -> list[float]:
            shape = (len(prompts), count)
            wins = quantities.winrates(gold.reshape(shape)[:, :most], opponents)
            scores = scores.reshape(shape)[:, :most]
            return quantities.headroom(scores, wins, settings.best_of_n).tolist()

        # The samples that were kept as scores only, drawn again with their random numbers.
        count = most + settings.opponents
        ours = drawn(self.ground, self.policy, "samples/test", count)
        theirs = drawn(small, policy, f"samples/resized {place}", most)
        verifier = scorers.trained_scorer(
            kind, section, self.ground, self.reward_model.params, self.policy
        )
        return {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(policy)),
            "verifier": gains(judge.score(*ours), known["gold"], count),
            "policy": gains(
                verifier.score(*theirs), np.asarray(self.task.reward(*theirs)), most
            ),
        }

    def samples(self, which: str) -> dict[str, np.ndarray]:
        """[prompts, per_prompt + opponents] of gold, lengths and scores by name, and `optimum` [prompts]."""
        path = self.directory("samples") / f"{which}.npz"
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays}

    def chosen(self, kind: str, count: int) -> tuple[int, dict[str, Any]]:
        """(trial, result) of a scorer's try with the best likelihood of validation labels."""
        results = [
            self.store.result(
                self.plan.of("scorer", self.seed, 0, scorer_arm(kind, count), trial)
            )
            for trial in range(len(self.settings.scorers.learning_rates))
        ]
        best = max(range(len(results)), key=lambda each: results[each]["validation"])
        return best, results[best]

    def _params(self, kind: config.Trainable, trial: int):
        arm = scorer_arm(kind, sizes_of(self.settings)[-1])
        shapes = (
            self.ground.policy_shapes()
            if kind == "DPO implicit reward"
            else self.ground.reward_model_shapes()
        )
        return loop.load_params(self.directory("scorer", arm=arm, trial=trial), shapes)

    def _trained(self, kind: config.Trainable, params) -> scorers.Scorer:
        return scorers.trained_scorer(
            kind, self.settings.scorers, self.ground, params, self.policy
        )

    def _untrained(self, kind: scorers.Untrained) -> scorers.Scorer:
        return scorers.untrained_scorer(kind, self.task, self.ground, self.policy)

    def _margins(self, scorer: scorers.Scorer) -> dict[str, list[float]]:
        """Of the validation and test pairs, and of the test pairs paraphrased where the task can do that."""
        found = {
            which: scorer.margins(self.pairs(which)).tolist()
            for which in ("validation", "test")
        }
        paraphrased = self._paraphrased(self.pairs("test"))
        if paraphrased is not None:
            found["paraphrased"] = scorer.margins(paraphrased).tolist()
        return found

    def _paraphrased(self, pairs: Pairs) -> Pairs | None:
        paraphrase = getattr(self.task, "paraphrase", None)
        if paraphrase is None:
            return None
        rng = role_rng(self.seed, "paraphrases")
        chosen = paraphrase(rng, pairs.prompts, pairs.chosen)
        rejected = paraphrase(rng, pairs.prompts, pairs.rejected)
        return dataclasses.replace(
            pairs,
            chosen=chosen,
            rejected=rejected,
            chosen_gold=self.task.reward(pairs.prompts, chosen),
            rejected_gold=self.task.reward(pairs.prompts, rejected),
        )


def draw(
    ground: Ground, policy, prompts: Prompts, count: int, seed: int, role: str
) -> Completions:
    """`count` samples of a policy for each prompt, those of one prompt in consecutive rows."""
    rollouts = sample_all(
        ground, policy, prompts, role_key(seed, role), num_samples=count
    )
    return completions_of(rollouts, ground.completion_length)

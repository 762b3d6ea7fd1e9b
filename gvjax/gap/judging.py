"""Who says which policy is better: the gold reward, a reward model, a model behind an endpoint, or people.

Every arm of the pilot meets the same opponent on the same prompts, the SFT policy's completion; a judge other than gold is
held against the gold reward, and its taste for length against gold's.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from gvjax import config
from gvjax.gap import planning, statistics
from gvjax.gap.findings import JudgeFinding
from gvjax.gap.measurement import GapPlan, MeasuredScene
from gvjax.gap.results import TaskResult
from gvjax.gap.stages import Store
from gvjax.judges import agreement, human
from gvjax.judges.endpoint import OPTIONS, Budget, Endpoint
from gvjax.judges.llm import Comparison, LlmJudge
from gvjax.recipes import best_of_n, loop, single
from gvjax.recipes.evaluation import evaluate_policy
from gvjax.recipes.programs import reward_all
from gvjax.recipes.rewards import RewardModel
from gvjax.recipes.rows import sequences
from gvjax.tasks.task import Completions

SELF_AGREEMENT = 0.8
"""Share of comparisons below which a judge that answers differently in the other order is warned about."""
GOLD_AGREEMENT = 0.8
"""The same of its agreement with gold, where gold is not a tie."""

Scores = np.ndarray
"""f64[N] in [0, 1], 1 where the arm's completion was preferred; NaN where there is no answer."""


class LabelsWanted(RuntimeError):
    """Sheets were written, or are not filled in yet; the message says where they lie."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """What the judge said.

    Attributes:
      wins: (arm, seed) -> f64[prompts], score over the SFT policy's completion; NaN where there is no answer.
      finding: who judged, and how far that can be trusted.
    """

    wins: Mapping[tuple[str, int], np.ndarray]
    finding: JudgeFinding


@dataclasses.dataclass(frozen=True)
class _Match:
    """One arm's completions against the SFT policy's, for one seed."""

    arm: str
    seed: int
    scene: MeasuredScene
    ours: Completions
    theirs: Completions
    gold: np.ndarray

    @property
    def longer(self) -> np.ndarray:
        return (self.ours.lengths - self.theirs.lengths).astype(np.float64)

    def texts(self) -> list[tuple[str, str, str]]:
        """(prompt, the arm's completion, the SFT policy's), decoded."""
        prompts = self.scene.test_prompts

        def shown(rows, i: int) -> str:
            return self.scene.task.decode(rows.tokens[i][: rows.lengths[i]])

        return [
            (shown(prompts, i), shown(self.ours, i), shown(self.theirs, i))
            for i in range(len(self.gold))
        ]


def check(settings: config.GapConfig) -> None:
    """Refuses a judge that could not be asked, before anything is trained.

    Raises:
      ConfigError: its reward model is not there or has another network, or its key is not in the environment.
    """
    section = settings.judge
    if isinstance(section, config.RewardModelJudgeSection):
        _reward_model(settings, section)
    elif isinstance(section, config.LlmJudgeSection):
        _llm(settings, section)


def judge(
    settings: config.GapConfig,
    plan: GapPlan,
    store: Store,
    number: int,
    pilot: TaskResult,
) -> Judged:
    """Compares every arm of the pilot with the SFT policy.

    Args:
      settings: the measurement.
      plan, store: its stages, all done.
      number: of the task.
      pilot: its arms.

    Raises:
      LabelsWanted: people are the judge, and have not labelled yet.
      JudgeError: the endpoint failed, or its budget is spent.
    """
    section = settings.judge
    arms = [arm for arm in pilot.arms if arm.road != "start"]
    if isinstance(section, config.GoldJudgeSection):
        wins = {
            (arm.name, seed.seed): statistics.win_scores(
                seed.gold, pilot.start.seed(seed.seed).gold
            )
            for arm in arms
            for seed in arm.seeds
        }
        count = sum(len(row) for row in wins.values())
        finding = JudgeFinding("gold", count, {})
        return Judged(wins, finding)
    matches = _matches(settings, plan, store, number, pilot)
    measures: dict[str, tuple[float, float | None, float | None]] = {}
    notes: list[str] = []
    if isinstance(section, config.RewardModelJudgeSection):
        scores = [_by_reward_model(settings, section, match) for match in matches]
    elif isinstance(section, config.LlmJudgeSection):
        scores = _by_llm(settings, section, matches, measures, notes)
    else:
        scores = _by_people(settings, section, number, matches, measures)
    warnings = _trust(matches, scores, measures)
    wins = {(m.arm, m.seed): row for m, row in zip(matches, scores)}
    count = sum(int(np.isfinite(row).sum()) for row in scores)
    finding = JudgeFinding(section.kind, count, measures, tuple(warnings), tuple(notes))
    return Judged(wins, finding)


def _matches(
    settings: config.GapConfig,
    plan: GapPlan,
    store: Store,
    number: int,
    pilot: TaskResult,
) -> list[_Match]:
    """Every arm's completions of the test prompts, drawn again with the random numbers they were reported with."""
    count = settings.judged_prompts or settings.evaluation.test_prompts
    made = []
    for seed in settings.seeds:
        scene = MeasuredScene(
            settings, plan.tasks[number], store, seed=seed, number=number
        )
        start, start_gold = _completions(scene, None)
        for arm in pilot.arms:
            if arm.road == "start":
                continue
            completions, gold = _completions(scene, arm.name)
            assert gold is not None and start_gold is not None
            made.append(
                _Match(
                    arm.name,
                    seed,
                    scene,
                    completions.take(slice(count)),
                    start.take(slice(count)),
                    statistics.win_scores(gold, start_gold)[:count],
                )
            )
    return made


def _completions(
    scene: MeasuredScene, arm: str | None
) -> tuple[Completions, np.ndarray | None]:
    params = scene.policy
    if arm is not None:
        settings, trial = scene.chosen_trial(arm)
        if isinstance(settings, config.BestOfNSection):
            inputs = scene.inputs(reward_model=scene.reward_model)
            judged = best_of_n.evaluate(
                settings, inputs, scene.test_prompts, role="test"
            )
            return judged.completions, judged.gold
        directory = scene.directory("trial", arm=arm, trial=trial)
        params = loop.load_params(directory, scene.ground.policy_shapes())
    judged = evaluate_policy(
        scene.ground,
        scene.task,
        params,
        scene.policy,
        scene.test_prompts,
        seed=scene.seed,
        role="test",
    )
    return judged.completions, judged.gold


def _reward_model(
    settings: config.GapConfig, section: config.RewardModelJudgeSection
) -> RewardModel:
    found = single.finished(section.run_dir, settings.mesh)
    ground = planning.ground_for(config.study_of(settings))
    if found.ground.model != ground.model:
        raise config.ConfigError(
            f"judge.run_dir: the reward model in {section.run_dir} has another network than this config's model; use its"
            f" own: {found.settings.model} (vocabulary of task {found.settings.task.name})"
        )
    return found.reward_model()


def _by_reward_model(
    settings: config.GapConfig, section: config.RewardModelJudgeSection, match: _Match
) -> Scores:
    model, ground = _reward_model(settings, section), match.scene.ground
    prompts = match.scene.test_prompts.take(slice(len(match.gold)))

    def reward(completions: Completions) -> np.ndarray:
        rows = sequences(prompts, completions, ground.pad_id)
        return reward_all(ground, model.pooling, model.params, rows)

    return statistics.win_scores(reward(match.ours), reward(match.theirs))


def _llm(settings: config.GapConfig, section: config.LlmJudgeSection) -> LlmJudge:
    cache = pathlib.Path(settings.run_dir) / "judgements"
    with config.refusing("judge"):
        return LlmJudge(
            Endpoint(
                section.base_url,
                section.model,
                key_variable=section.key_variable,
                options={
                    name: value
                    for name, value in {**OPTIONS, **section.options}.items()
                    if value is not None
                },
                timeout=section.timeout,
            ),
            cache=cache,
            budget=Budget(calls=section.calls),
            ledger=cache / "spent.json",
            max_failure_share=section.max_failure_share,
        )


def _by_llm(
    settings: config.GapConfig,
    section: config.LlmJudgeSection,
    matches: Sequence[_Match],
    measures: dict[str, tuple[float, float | None, float | None]],
    notes: list[str],
) -> list[Scores]:
    asked = _llm(settings, section)
    comparisons = [Comparison(*texts) for match in matches for texts in match.texts()]
    said = asked(comparisons)
    first, second = said.orders
    if len(first):
        prompts = _prompts(matches)[said.in_both]
        itself = agreement.self_consistency(first, second, clusters=prompts)
        _note(measures, "answers the same in both orders", itself.agreement)
        _note(measures, "prefers what is shown first", itself.first)
    failed = ", ".join(f"{count} {kind}" for kind, count in said.failures.items())
    notes.append(
        f"{said.requests} requests, {said.spent.calls} sent, {said.spent.cached} answered from disk,"
        f" {said.spent.tokens} tokens; without a usable answer: {failed or 'none'}"
    )
    return _split(said.scores, matches)


def _by_people(
    settings: config.GapConfig,
    section: config.HumanJudgeSection,
    number: int,
    matches: Sequence[_Match],
    measures: dict[str, tuple[float, float | None, float | None]],
) -> list[Scores]:
    name = config.gap_tasks(settings)[number].name.replace(":", "-")
    sheet = pathlib.Path(section.directory) / f"{name}.csv"
    key = pathlib.Path(settings.run_dir) / f"{name}-key.json"
    pairs = [texts for match in matches for texts in match.texts()]
    if not key.exists():
        sheet.parent.mkdir(parents=True, exist_ok=True)
        with config.refusing("judge"):
            human.export_pairs(sheet, key, pairs, seed=settings.seeds[0])
        raise LabelsWanted(
            f"{len(pairs)} comparisons are in {sheet}: fill in its column `preferred` with first, second or tie, and give"
            " the same command again"
        )
    try:
        labels = human.import_labels(sheet, key, pairs, seed=settings.seeds[0])
    except human.OtherPairsError as error:
        raise config.ConfigError(f"judge: {error}") from None
    except (OSError, ValueError) as error:
        raise LabelsWanted(str(error)) from None
    shown_first = np.where(labels.a_was_first, labels.scores, 1 - labels.scores)
    _note(
        measures,
        "prefers what is shown first",
        agreement.mean(shown_first, clusters=_prompts(matches)),
    )
    return _split(labels.scores, matches)


def _prompts(matches: Sequence[_Match]) -> np.ndarray:
    """i[N], the prompt of each comparison: those of one prompt share the SFT policy's completion, and what is hard about it."""
    numbers: dict[bytes, int] = {}
    found = []
    for match in matches:
        rows = match.scene.test_prompts
        for tokens, length in zip(rows.tokens[: len(match.gold)], rows.lengths):
            ids = tokens[:length].tobytes()
            found.append(numbers.setdefault(ids, len(numbers)))
    return np.array(found)


def _split(scores: np.ndarray, matches: Sequence[_Match]) -> list[Scores]:
    ends = np.cumsum([len(match.gold) for match in matches])[:-1]
    return np.split(np.asarray(scores, np.float64), ends)


def _trust(
    matches: Sequence[_Match],
    scores: Sequence[Scores],
    measures: dict[str, tuple[float, float | None, float | None]],
) -> list[str]:
    """Agreement with gold, and the taste for length; adds to `measures` and returns what to be warned about."""
    said = np.concatenate(scores)
    gold = np.concatenate([match.gold for match in matches])
    longer = np.concatenate([match.longer for match in matches])
    answered = np.isfinite(said)
    said, gold, longer = said[answered], gold[answered], longer[answered]
    prompts = _prompts(matches)[answered]
    warnings = []
    itself = measures.get("answers the same in both orders")
    if itself is not None and itself[0] < SELF_AGREEMENT:
        warnings.append(
            f"The judge answers the same in both orders in only {itself[0]:.0%} of comparisons."
        )
    with_gold = agreement.label_agreement(said, gold, clusters=prompts)
    _note(measures, "agrees with the gold reward", with_gold.agreement)
    _note(measures, "agreement beyond chance (κ)", with_gold.kappa)
    decided = gold != 0.5
    if decided.any():
        right = agreement.label_agreement(
            said[decided], gold[decided], clusters=prompts[decided]
        ).agreement
        _note(measures, "agrees where gold is no tie", right)
        if right.value < GOLD_AGREEMENT:
            warnings.append(
                f"The judge agrees with the gold reward in only {right.value:.0%} of the comparisons that gold decides."
            )
    effect = agreement.length_effect(said, longer, clusters=prompts)
    _note(measures, "log-odds for being longer", effect.coefficient)
    _note(measures, "winrate at equal length", effect.winrate)
    bias = agreement.length_bias(said, gold, longer, clusters=prompts)
    _note(measures, "the same, less gold's", bias)
    if agreement.likes_length(effect, bias):
        warnings.append(
            f"The judge likes length more than the gold reward does: by {bias.value:.2f} log-odds per typical difference."
        )
    elif bias.reason == f"judge: {agreement.SEPARATED}":
        warnings.append(
            "Length decides every preference of the judge, and not every one of the gold reward."
        )
    return warnings


def _note(
    measures: dict[str, tuple[float, float | None, float | None]],
    name: str,
    found: agreement.Measured,
) -> None:
    """Keeps a number that there is."""
    if np.isfinite(found.value):
        measures[name] = (found.value, found.low, found.high)

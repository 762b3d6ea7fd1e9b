"""One recipe by itself, as `gvjax run` does it, and a look at what it made."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Collection
from typing import Any

import jax

from gvjax import config, losses
from gvjax.judges.verifier import Verifier
from gvjax.recipes import (
    best_of_n,
    checks,
    dpo,
    hypo,
    identity,
    loop,
    online_dpo,
    packed,
    policy_gradient,
    ppo,
    rebel,
    rejection,
    reward,
    sft,
)
from gvjax.recipes.dataset import Dataset
from gvjax.recipes.evaluation import PolicyEvaluation, evaluate_policy, gold_of
from gvjax.recipes.ground import Ground, ground_of, task_of
from gvjax.recipes.inputs import Inputs
from gvjax.recipes.pairs import Pairs, labelled_pairs
from gvjax.recipes.programs import sample_all
from gvjax.recipes.rewards import RewardModel
from gvjax.recipes.rows import completions_of, role_key, role_rng
from gvjax.tasks.task import Prompts, Task
from gvjax.types import Params

TRAIN: dict[str, Callable[..., loop.Trained]] = {
    "dpo": dpo.train,
    "hypo": hypo.train,
    "online_dpo": online_dpo.train,
    "policy_gradient": policy_gradient.train,
    "ppo": ppo.train,
    "rebel": rebel.train,
    "rejection": rejection.train,
}
"""Recipes that turn a policy into another, by name."""


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run that is done.

    Attributes:
      settings: its resolved config.
      directory: its run directory.
      task, ground: as it used them.
    """

    settings: config.RunConfig
    directory: pathlib.Path
    task: Task
    ground: Ground

    @property
    def makes_policy(self) -> bool:
        return self.settings.settings.recipe not in ("reward", "best_of_n")

    def policy(self) -> Params:
        """The policy it made.

        Raises:
          ConfigError: it made a reward model, or nothing.
        """
        if not self.makes_policy:
            raise config.ConfigError(
                f"{self.directory} holds the result of recipe {self.settings.settings.recipe}, not a policy"
            )
        return loop.load_params(self.directory, self.ground.policy_shapes())

    def reward_model(self) -> RewardModel:
        """The reward model it made.

        Raises:
          ConfigError: it made none.
        """
        section = self.settings.settings
        if not isinstance(section, config.RewardSection):
            raise config.ConfigError(
                f"{self.directory} holds the result of recipe {section.recipe}, not a reward model"
            )
        params = loop.load_params(self.directory, self.ground.reward_model_shapes())
        return RewardModel(params, section.pooling)


def finished(
    directory: pathlib.Path | str, mesh: config.MeshSection | None = None
) -> Finished:
    """Opens a finished run, on its own mesh or on another.

    Raises:
      ConfigError: there is none, or it is not finished.
    """
    directory = pathlib.Path(directory)
    if not (directory / "result.json").exists():
        raise config.ConfigError(
            f"{directory} holds no finished run; finish it with `gvjax run` first"
        )
    settings = config.reread((directory / "config.json").read_text(encoding="utf-8"))
    task = task_of(settings.task, settings.seed)
    ground = ground_of(task, settings.model, mesh or settings.mesh, settings.lora)
    return Finished(settings, directory, task, ground)


def train_policy(
    section: config.Recipe, inputs: Inputs, run: loop.Run, *, select: loop.Select
) -> loop.Trained:
    """Runs a recipe that turns a policy into another; adapters are merged into what comes out."""
    trained = TRAIN[section.recipe](section, inputs, run, select=select)
    return dataclasses.replace(trained, params=inputs.ground.merged(trained.params))


def check_pairs(section: config.PairsSection, task: Task) -> None:
    """Refuses pairs that a task cannot give.

    Raises:
      ConfigError: a dataset brings its own pairs and `tau` or `temperature` is given, or it has neither pairs nor a gold
        reward.
    """
    if not isinstance(task, Dataset):
        return
    for field in ("tau", "temperature"):
        if task.has_pairs and field in section.model_fields_set:
            raise config.ConfigError(
                f"pairs.{field} is given, but dataset {task.name} has labelled pairs of its own; take it out of the config"
            )
    if not task.has_pairs and task.judge is None:
        raise config.ConfigError(
            f"dataset {task.name} has no pairs, and no gold reward to label samples by; give task.gold, or rows that are"
            " preferences"
        )


def check(section: config.Recipe, ground: Ground) -> None:
    """Refuses what a recipe would fail on later, before anything is compiled.

    Raises:
      ConfigError: a loss, a verifier or a size does not fit; the message names the field.
    """
    with config.refusing(f"recipe {section.recipe}"):
        if isinstance(section, config.DpoSection):
            _check_loss(section)
        if isinstance(
            section, config.SftSection | config.RewardSection | config.DpoSection
        ):
            packed.check(section, ground)
        checks.check_rows(section, ground)
        penalty = getattr(section, "missing_eos_penalty", 0.0)
        if penalty and ground.eos_id is None:
            raise ValueError(
                f"missing_eos_penalty is {penalty}, but completions of this task have no EOS; set it to 0"
            )
        rewards = getattr(section, "rewards", None)
        verifier = rewards.verifier if rewards is not None else None
        if verifier is not None and verifier.path != "gold":
            # Imports the function in its process, and lets go of it.
            with Verifier(
                verifier.path,
                time_limit=verifier.time_limit,
                error_reward=verifier.error_reward,
                max_error_share=verifier.max_error_share,
            ):
                pass


def _check_loss(section: config.DpoSection) -> None:
    loss = dpo.make_loss(section)
    lacking = {"chosen_probability", "margin"} & set(losses.arguments(loss))
    if lacking:
        raise ValueError(
            f"the loss {section.loss} asks for {', '.join(sorted(lacking))}, which the pairs do not have; use another"
        )
    if section.packed_length is not None and losses.couples_rows(loss):
        raise ValueError(
            f"packed_length is given, but the loss {section.loss} compares rows with each other and cannot weigh the places"
            " that a packed row leaves empty; take packed_length out of the config"
        )
    if section.num_microbatches > 1 and losses.couples_rows(loss):
        raise ValueError(
            f"num_microbatches is {section.num_microbatches}, but the loss {section.loss} compares rows with each"
            " other; use 1"
        )


def run(
    settings: config.RunConfig,
    *,
    progress: loop.Progress = loop.nobody,
    show: Callable[[str], None] | None = None,
    force: Collection[str] = (),
) -> dict[str, Any]:
    """Runs one recipe to its end, or goes on with it.

    Args:
      settings: the run.
      progress: told after every round.
      show: given a few decoded completions now and then.
      force: fields in which it may differ from the run that stands in run_dir, see `identity.compare`.

    Returns:
      What was written to `result.json`: the round of the kept checkpoint, the curve and the last evaluation.

    Raises:
      ConfigError: the config cannot be run, or differs from that of the run that already stands in run_dir.
    """
    directory = pathlib.Path(settings.run_dir)
    done = directory / "result.json"
    what = identity.identity_of(settings)
    identity.compare(settings, what, force)
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    section = settings.settings
    task = task_of(settings.task, settings.seed)
    ground = ground_of(task, settings.model, settings.mesh, settings.lora)
    check(section, ground)
    if settings.pairs is not None:
        check_pairs(settings.pairs, task)
    prompts, validation, heldout = _prompts(settings, task)
    policy, reward_model = _starts(settings, ground)
    # Kept only now: a config that was refused must not stand in the way of the corrected one.
    if jax.process_index() == 0:
        identity.keep(settings, what)
    one = loop.Run(
        directory,
        {**what, **_content(task)},
        settings.logging,
        settings.checkpoints,
        settings.timeouts,
        progress,
        force=tuple(force),
    )
    if show is not None and section.recipe != "reward":
        one = dataclasses.replace(one, show=_shower(ground, task, validation, show))
    if isinstance(section, config.SftSection):
        trained = sft.train(section, ground, task, settings.seed, one)
        trained = dataclasses.replace(trained, params=ground.merged(trained.params))
    else:
        if policy is None:
            policy = ground.init_policy(role_key(settings.seed, "init"))
        inputs = Inputs(
            ground=ground,
            task=task,
            seed=settings.seed,
            policy=policy,
            reference=policy,
            prompts=prompts,
            validation=validation,
            reward_model=reward_model,
            **_pairs(settings, ground, task, policy, prompts, heldout),
        )
        if isinstance(section, config.BestOfNSection):
            judged = best_of_n.evaluate(section, inputs, validation, role="validation")
            return _finish(done, {"round": 0, "curve": [], **judged.summary()})
        if isinstance(section, config.RewardSection):
            trained = reward.train(section, inputs, one)
        else:
            trained = train_policy(section, inputs, one, select=settings.select)
    loop.save_params(directory, trained.params)
    last = trained.curve[-1] if trained.curve else {}
    return _finish(done, {**last, "round": trained.round, "curve": trained.curve})


def judge(
    run: Finished, *, prompts: int, seed: int
) -> tuple[PolicyEvaluation, Prompts]:
    """One temperature-1 completion of each of some test prompts, judged; KL is to the policy the run started from."""
    chosen = judged_prompts(run, prompts, seed)
    policy = run.policy()
    reference = policy if run.settings.settings.recipe == "sft" else started(run)
    judged = evaluate_policy(
        run.ground, run.task, policy, reference, chosen, seed=seed, role="judge"
    )
    return judged, chosen


def judged_prompts(run: Finished, count: int, seed: int) -> Prompts:
    """Test prompts; of a dataset with fewer rows, all that there are."""
    if isinstance(run.task, Dataset):
        count = min(count, run.task.size("test"))
    return run.task.prompts(role_rng(seed, "judged prompts"), count, "test")


def heldout_pairs(run: Finished, count: int, seed: int) -> Pairs:
    """Labelled pairs on test prompts: a dataset's, else fresh ones of the policy that the run started from."""
    section = run.settings.pairs or config.PairsSection()
    return labelled_pairs(
        run.ground,
        run.task,
        started(run),
        judged_prompts(run, count, seed),
        seed=seed,
        role="judge",
        tau=section.tau,
        temperature=section.temperature,
    )


def started(run: Finished) -> Params:
    """The policy that a run started from."""
    if run.settings.start is None:
        return run.ground.init_policy(role_key(run.settings.seed, "init"))
    return finished(run.settings.start).policy()


def _prompts(
    settings: config.RunConfig, task: Task
) -> tuple[Prompts, Prompts, Prompts | None]:
    """Training and validation prompts, and those of the pairs held out, if there are any.

    Raises:
      ConfigError: a dataset has fewer rows than are asked for.
    """
    rng = role_rng(settings.seed, "prompts")
    count, asks = 1000, "task"
    if isinstance(task, Dataset):
        count = task.size("train")
    if settings.pairs is not None:
        count, asks = settings.pairs.count, "pairs.count"
    judged = settings.evaluation.validation_prompts
    if isinstance(task, Dataset) and settings.settings.recipe in ("sft", "reward"):
        # They are not judged on prompts: only shown some.
        judged = min(judged, task.size("validation"))
    with config.refusing(asks):
        prompts = task.prompts(rng, count, "train")
    with config.refusing("evaluation.validation_prompts"):
        validation = task.prompts(rng, judged, "validation")
    if settings.pairs is None:
        return prompts, validation, None
    rng = role_rng(settings.seed, "held-out prompts")
    with config.refusing("pairs.heldout"):
        heldout = task.prompts(rng, settings.pairs.heldout, "validation")
    return prompts, validation, heldout


def _content(task: Task) -> dict[str, Any]:
    """What the rows of a dataset were, for a run that goes on with them."""
    return {identity.ROWS: task.fingerprint} if isinstance(task, Dataset) else {}


def _starts(
    settings: config.RunConfig, ground: Ground
) -> tuple[Params, RewardModel | None]:
    """The policy and the reward model that earlier runs made.

    Raises:
      ConfigError: such a run is not finished, or has another network.
    """

    def opened(field: str) -> Finished | None:
        directory = getattr(settings, field)
        if directory is None:
            return None
        found = finished(directory, settings.mesh)
        if found.ground.model != ground.model:
            raise config.ConfigError(
                f"{field}: the run in {directory} has another network than this config's model; use its own:"
                f" {found.settings.model} (vocabulary of task {found.settings.task.name})"
            )
        return found

    start, verifier = opened("start"), opened("reward_model")
    return (
        None if start is None else start.policy(),
        None if verifier is None else verifier.reward_model(),
    )


def _pairs(
    settings: config.RunConfig,
    ground: Ground,
    task: Task,
    policy: Params,
    prompts: Prompts,
    heldout: Prompts | None,
) -> dict[str, Pairs]:
    """`pairs` and `heldout`, for recipes that read them."""
    if settings.pairs is None or heldout is None:
        return {}
    return {
        name: labelled_pairs(
            ground,
            task,
            policy,
            rows,
            seed=settings.seed,
            role=f"pairs/{name}",
            tau=settings.pairs.tau,
            temperature=settings.pairs.temperature,
        )
        for name, rows in (("pairs", prompts), ("heldout", heldout))
    }


def _finish(path: pathlib.Path, result: dict[str, Any]) -> dict[str, Any]:
    if jax.process_index() != 0:
        return result
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(result) + "\n", encoding="utf-8")
    partial.replace(path)
    return result


def _shower(ground: Ground, task: Task, prompts: Prompts, show: Callable[[str], None]):
    few = prompts.take(slice(0, 2))

    def show_samples(params: Params) -> None:
        for prompt, completion, gold in samples(ground, task, params, few, seed=0):
            judged = "" if gold is None else f"   gold {gold:.2f}"
            show(f"{prompt}  →  {completion}{judged}")

    return show_samples


def samples(
    ground: Ground,
    task: Task,
    params: Params,
    prompts: Prompts,
    *,
    seed: int,
    num_samples: int = 1,
    temperature: float = 1.0,
) -> list[tuple[str, str, float | None]]:
    """(prompt, completion, gold reward or None) of some completions, decoded."""
    rollouts = sample_all(
        ground,
        params,
        prompts,
        role_key(seed, "shown"),
        num_samples=num_samples,
        temperature=temperature,
    )
    completions = completions_of(rollouts, ground.completion_length)
    rows = prompts.repeat(num_samples)
    gold = gold_of(task, rows, completions)
    return [
        (
            task.decode(rows.tokens[i][: rows.lengths[i]]),
            task.decode(completions.tokens[i][: completions.lengths[i]]),
            None if gold is None else float(gold[i]),
        )
        for i in range(len(rows))
    ]

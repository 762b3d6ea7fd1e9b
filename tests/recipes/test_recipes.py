"""Every recipe end to end at toy size: it runs, resumes to the bit, refuses to start on a wrong footing, and learns."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from kept_runs import make_run, metrics_of, same_bits

from gvjax import config, losses, steps
from gvjax.masked import Mean
from gvjax.recipes import (
    best_of_n,
    checks,
    dpo,
    hypo,
    loop,
    online_dpo,
    policy_gradient,
    ppo,
    rebel,
    rejection,
    reward,
    rounds,
    sft,
)
from gvjax.recipes.evaluation import evaluate_policy
from gvjax.recipes.pairs import sampled_pairs
from gvjax.recipes.programs import score_all
from gvjax.recipes.rewards import Source, make_rewards, reward_rows
from gvjax.recipes.rows import role_key
from gvjax.types import PreferenceBatch, Rollouts, SequenceBatch

GOLD = config.RewardSources(reward_model=0.0, verifier=config.VerifierSection())
BOTH = config.RewardSources(reward_model=0.5, verifier=config.VerifierSection())

EVERY = {"loss", "grad_norm", "skipped", "learning_rate"}
PAIRED = EVERY | {
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
}
REWARDS = {"rewards/reward_model/mean", "rewards/reward_model/std"}
BY_GOLD = {"rewards/gold/mean", "rewards/gold/std"}
ROUND = {
    "objective/entropy",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "objective/kl",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
}
OF_THE_KL = {"objective/kl", "objective/non_score_reward", "objective/rlhf_reward"}
ONLINE_PAIRED = (
    PAIRED
    | ROUND
    | {
        "objective/scores",
        "objective/scores_margin",
    }
    | OF_THE_KL
)
GROUPED = (
    EVERY
    | ROUND
    | {"kl", "entropy", "sampling/importance_sampling_ratio/mean"}
    | {"sampling/sampling_logp_difference/max"}
    | REWARDS
)
PPO = (
    EVERY
    | ROUND
    | {
        "objective/non_score_reward",
        "objective/rlhf_reward",
        "objective/scores",
        "policy/approxkl_avg",
        "policy/clipfrac_avg",
        "policy/entropy_avg",
        "loss/policy_avg",
        "loss/value_avg",
        "val/clipfrac_avg",
        "val/ratio",
    }
)


def small(kind, **fields):
    """Two rounds of few rows."""
    sizes = {
        "steps": 2,
        "batch_size": 8,
        "prompts_per_step": 4,
        "samples_per_prompt": 4,
        "on_policy_prompts": 4,
        "n": 4,
        "evaluate_every": 1,
    }
    ours = {name: value for name, value in sizes.items() if name in kind.model_fields}
    return kind(**{**ours, **fields})


def group(algorithm, **fields):
    return (
        policy_gradient,
        small(config.PolicyGradientSection, algorithm=algorithm, **fields),
        GROUPED,
    )


ALGORITHMS = ("reinforce", "rloo", "grpo", "dr_grpo", "dapo", "gspo", "cispo")
EPOCHS = {"reinforce": 1, "rloo": 1}
CASES = {
    "dpo": (dpo, small(config.DpoSection, beta=0.1), PAIRED),
    "dpo nll": (dpo, small(config.DpoSection, nll_weight=1.0), PAIRED),
    "dpo ipo": (
        dpo,
        small(config.DpoSection, loss="ipo", loss_options={"tau": 0.5}),
        PAIRED,
    ),
    "dpo import path": (
        dpo,
        small(config.DpoSection, loss="gvjax.losses:hinge_loss", num_microbatches=2),
        PAIRED,
    ),
    "hypo": (hypo, small(config.HypoSection), PAIRED | {"objective/kl"}),
    "online dpo hard": (
        online_dpo,
        small(config.OnlineDpoSection),
        ONLINE_PAIRED | REWARDS,
    ),
    "online dpo soft": (
        online_dpo,
        small(config.OnlineDpoSection, labels="soft", epochs=2),
        ONLINE_PAIRED,
    ),
    "online dpo once": (
        online_dpo,
        small(config.OnlineDpoSection, generation="once", rewards=BOTH),
        (ONLINE_PAIRED | REWARDS | BY_GOLD) - OF_THE_KL,
    ),
    **{f"{name}, KL in reward": group(name) for name in ALGORITHMS},
    **{
        f"{name}, KL in loss": group(
            name, kl_in="loss", kl_estimator="k3", epochs=EPOCHS.get(name, 2)
        )
        for name in ALGORITHMS
    },
    "rloo, two epochs": group("rloo", epochs=2),
    "ppo": (ppo, small(config.PpoSection), PPO | REWARDS),
    "ppo plain": (
        ppo,
        small(
            config.PpoSection,
            whiten_advantages=False,
            lam=1.0,
            gamma=0.9,
            rewards=GOLD,
            num_microbatches=2,
        ),
        PPO | BY_GOLD,
    ),
    "rebel": (
        rebel,
        small(config.RebelSection),
        PAIRED | ROUND | REWARDS | {"objective/scores", "objective/scores_margin"},
    ),
    "rejection": (
        rejection,
        small(config.RejectionSection),
        EVERY | {"reward", "completions/mean_length"},
    ),
}


def check_metrics(run, names):
    lines = metrics_of(run)
    trained = [line for line in lines if "loss" in line]
    assert [line["global_step"] for line in trained] == list(range(1, len(trained) + 1))
    for line in trained:
        assert names <= set(line), names - set(line)
    for line in lines:
        assert all(v is not None and math.isfinite(v) for v in line.values()), line


LATER = {f"{name}, KL in loss" for name in ALGORITHMS} - {"grpo, KL in loss"}
LATER |= {"online dpo", "rebel learns", "hypo learns", "rejection learns"}


def marked(names):
    """The names, those that a short run can do without left to `-m exhaustive`."""
    return [
        pytest.param(name, marks=[pytest.mark.exhaustive] if name in LATER else [])
        for name in names
    ]


@pytest.mark.parametrize("case", marked(CASES))
def test_every_recipe_runs_and_says_what_users_of_trl_look_for(case, inputs, tmp_path):
    module, settings, names = CASES[case]
    run = make_run(tmp_path / "run")
    trained = module.train(settings, inputs, run)
    check_metrics(run, names)
    assert [numbers["round"] for numbers in trained.curve] == [1, 2]
    assert {"gold", "kl", "length"} <= set(trained.curve[0])
    # What comes back is a policy of the same shape, not the one it started from.
    shapes = jax.tree.map(jnp.shape, trained.params)
    assert shapes == jax.tree.map(jnp.shape, inputs.policy)
    assert not same_bits(trained.params, inputs.policy)


def test_the_recipes_before_the_fork_log_their_metrics(inputs, runs):
    check_metrics(runs["sft"], EVERY | {"completions/mean_length"})
    rewards = {"accuracy", "margin", "mean_reward", "min_reward", "max_reward"}
    check_metrics(runs["reward"], EVERY | rewards)
    assert (
        metrics_of(runs["sft"])[-1]["loss"] < metrics_of(runs["sft"])[0]["loss"] - 0.5
    )


def test_the_reward_model_fits_its_pairs(inputs):
    margins = reward.reward_margins(
        inputs.ground,
        config.RewardSection(),
        inputs.reward_model.params,
        inputs.pairs,
    )
    # Chance is 0.5 ± 0.035; what is learned differs by some pairs between processors, which round differently.
    assert np.mean(margins > 0) > 0.7


# Resuming.


class Interrupted(Exception):
    pass


def stop_after(rounds):
    def progress(done, total, shown):
        if done == rounds:
            raise Interrupted

    return progress


@pytest.mark.parametrize(
    ("module", "settings", "select"),
    [
        (dpo, small(config.DpoSection, steps=5, evaluate_every=2), "best"),
        (rejection, small(config.RejectionSection, steps=5), "last"),
        (ppo, small(config.PpoSection, steps=5, evaluate_every=2), "best"),
    ],
    ids=["dpo", "rejection", "ppo"],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(
    module, settings, select, inputs, tmp_path
):
    whole = make_run(tmp_path / "run", checkpoint_every=2)
    expected = module.train(settings, inputs, whole, select=select)
    lines = (whole.directory / "metrics.jsonl").read_bytes()

    (tmp_path / "again").mkdir()
    directory = tmp_path / "again" / "run"
    broken = make_run(directory, checkpoint_every=2, progress=stop_after(3))
    with pytest.raises(Interrupted):
        module.train(settings, inputs, broken, select=select)
    rounds = []
    resumed = make_run(
        directory,
        checkpoint_every=2,
        progress=lambda done, total, shown: rounds.append(done),
    )
    found = module.train(settings, inputs, resumed, select=select)
    assert rounds == [3, 4, 5]
    assert same_bits(found.params, expected.params)
    assert found.curve == expected.curve and found.round == expected.round
    assert (directory / "metrics.jsonl").read_bytes() == lines


def test_another_computation_is_not_resumed(inputs, tmp_path):
    settings = small(config.DpoSection, steps=3)
    run = make_run(tmp_path / "run", checkpoint_every=2)
    dpo.train(settings, inputs, run)
    other = dataclasses.replace(run, identity={"test": "another"})
    with pytest.raises(ValueError, match="another"):
        dpo.train(settings, inputs, other)


def test_a_loss_that_stays_infinite_stops_the_run(inputs, tmp_path):
    def advance(state, round_):
        return state, {"loss": jnp.where(round_ < 2, 1.0, jnp.nan)}

    state = steps.init_train_state({"w": jnp.zeros(2)}, optax.sgd(0.1))
    with pytest.raises(loop.NonFiniteError, match="for 3 rounds up to 5"):
        loop.train(make_run(tmp_path / "run"), state, advance, rounds=50, patience=3)


def test_the_learning_rate_of_skipped_rounds_is_told_again(tmp_path):
    """The schedule does not go on in them: neither does the optimizer's count, before and after a checkpoint."""
    schedule = optax.linear_schedule(1.0, 0.0, 8)
    tx = optax.chain(optax.clip(1.0), optax.scale_by_learning_rate(schedule))
    step = jax.jit(
        steps.make_train_step(
            lambda params, batch: (Mean(params["w"] * batch, jnp.ones(())), {}), tx
        )
    )
    # Two updates a round; one of them, all and none are skipped.
    rounds = [(1.0, 1.0), (1.0, jnp.nan), (jnp.nan, jnp.nan), (1.0, 1.0), (1.0, 1.0)]

    def advance(state, round_):
        for value in rounds[round_]:
            state, metrics = step(state, jnp.asarray(value))
        return state, metrics

    def train(directory, **options):
        return loop.train(
            make_run(directory, checkpoint_every=2, **options),
            steps.init_train_state({"w": jnp.zeros(())}, tx),
            advance,
            rounds=len(rounds),
            learning_rate=schedule,
        )

    train(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tmp_path / "run", progress=stop_after(3))
    train(tmp_path / "run")
    for directory in (tmp_path / "whole", tmp_path / "run"):
        told = [line["learning_rate"] for line in metrics_of(make_run(directory))]
        assert told == [1 - done / 8 for done in (0, 2, 3, 3, 5)]


def test_the_best_checkpoint_is_the_one_returned(tmp_path):
    def advance(state, round_):
        params = {"policy": {"w": jnp.full(2, round_ + 1.0)}, "value": jnp.zeros(3)}
        return dataclasses.replace(state, params=params), {"loss": jnp.zeros(())}

    def evaluate(policy):
        return {"gold": -abs(float(policy["w"][0]) - 3.0)}

    def train(name, select):
        params = {"policy": {"w": jnp.zeros(2)}, "value": jnp.zeros(3)}
        return loop.train(
            make_run(tmp_path / name),
            steps.init_train_state(params, optax.sgd(0.1)),
            advance,
            rounds=5,
            evaluate=evaluate,
            evaluate_every=1,
            select=select,
            policy_of=lambda params: params["policy"],
        )

    best, last = train("best", "best"), train("last", "last")
    assert best.round == 3 and best.params["w"][0] == 3.0
    assert last.round == 5 and last.params["w"][0] == 5.0
    assert [numbers["gold"] for numbers in best.curve] == [-2, -1, 0, -1, -2]


# Self-checks.


def moved(params):
    return jax.tree.map(lambda leaf: leaf + 0.05, params)


@pytest.mark.parametrize("case", ["dpo", "dpo nll", "hypo"])
def test_a_wrong_reference_stops_the_run_before_it_starts(case, inputs, tmp_path):
    module, settings, _ = CASES[case]
    wrong = dataclasses.replace(inputs, policy=moved(inputs.policy))
    run = make_run(tmp_path / "run")
    with pytest.raises(checks.SelfCheckError, match="the reference is another model"):
        module.train(settings, wrong, run)
    assert not run.directory.exists()


@pytest.mark.parametrize(
    "case", ["dpo", "hypo", "online dpo hard", "ppo", "rebel", "rejection"]
)
def test_a_wrong_first_loss_stops_the_run(case, inputs, tmp_path, monkeypatch):
    module, settings, _ = CASES[case]
    make = steps.make_train_step

    def wrong(objective, tx, **options):
        def shifted(params, batch):
            loss, metrics = objective(params, batch)
            more = {
                name: Mean(metrics[name].total + 0.5 * loss.weight, loss.weight)
                for name in metrics
                if name == "loss/value_avg"
            }
            return Mean(loss.total + 0.5 * loss.weight, loss.weight), {
                **metrics,
                **more,
            }

        return make(shifted, tx, **options)

    for place in (steps, steps.preference, steps.ppo, steps.supervised):
        monkeypatch.setattr(place, "make_train_step", wrong)
    # Another learning rate: compiled steps are shared between runs of equal settings.
    settings = settings.model_copy(
        update={"optimizer": config.OptimizerSection(learning_rate=1.234e-4)}
    )
    with pytest.raises(checks.SelfCheckError, match=r"the first .* loss is"):
        module.train(settings, inputs, make_run(tmp_path / "run"))


def test_a_first_round_of_equal_rewards_is_told_and_the_run_goes_on(
    inputs, tmp_path, monkeypatch, caplog
):
    constant = Source(lambda rollouts, prompts: np.zeros(len(prompts), "f4"))
    monkeypatch.setattr(rounds, "make_sources", lambda *_: {"constant": constant})
    run = make_run(tmp_path / "run")
    online_dpo.train(small(config.OnlineDpoSection), inputs, run)
    assert [line["loss"] for line in metrics_of(run) if "loss" in line] == [0, 0]
    assert "no prompt had two different rewards" in caplog.text


def some_rollouts(rewards=None):
    tokens = jnp.array([[1, 2, 3, 4], [1, 2, 4, 3], [2, 1, 5, 0], [2, 1, 0, 5]])
    mask = jnp.array([[False, True, True, True]] * 4).at[2, 3].set(False)
    logps = -jnp.arange(16.0).reshape(4, 4) / 10
    return Rollouts(tokens, mask, logps, rewards)


def test_a_sampler_that_disagrees_with_the_scorer_is_refused(inputs):
    best = best_of_n.winners(inputs, GOLD, inputs.prompts.take(slice(4)), n=2, role="x")
    checks.check_rollouts(inputs.ground, inputs.policy, best)
    off = dataclasses.replace(best, logps=best.logps + 0.01)
    with pytest.raises(checks.SelfCheckError, match="sampler and scorer differ by 1"):
        checks.check_rollouts(inputs.ground, inputs.policy, off)


def test_batches_without_completions_or_prompts_are_refused():
    tokens = np.ones((2, 3), np.int32)
    with pytest.raises(checks.SelfCheckError, match="no completion token"):
        checks.check_masks(SequenceBatch(tokens, np.zeros((2, 3), bool)))
    with pytest.raises(checks.SelfCheckError, match=r"rows \[0, 1\]"):
        checks.check_masks(SequenceBatch(tokens, np.ones((2, 3), bool)))


def endings(*rows, eos_id=9, shortest_prompt=1):
    """(a ground with room for three tokens, a batch of completions after one prompt token; 0 is padding)."""
    tokens = np.array([[1, *row] for row in rows], np.int32)
    ground = types.SimpleNamespace(
        eos_id=eos_id, completion_length=3, shortest_prompt=shortest_prompt
    )
    return ground, SequenceBatch(tokens, (tokens != 0) & (np.arange(4) > 0))


def test_completions_end_with_one_eos_or_fill_the_room():
    # One that ends, one that was cut off, one that is empty.
    checks.check_endings(*endings([2, 9, 0], [2, 3, 4], [0, 0, 0]), some_end=True)
    checks.check_endings(*endings([2, 3, 4]))
    checks.check_endings(*endings([2, 3, 0], eos_id=None), some_end=True)
    for row, count in (([2, 3, 0], 0), ([9, 2, 0], 1), ([2, 9, 9], 2)):
        with pytest.raises(
            checks.SelfCheckError, match=rf"row 1 .* with {count} EOS tokens \(9\)"
        ):
            checks.check_endings(*endings([2, 9, 0], row))
    with pytest.raises(checks.SelfCheckError, match="could not learn to stop"):
        checks.check_endings(*endings([2, 3, 4], [4, 3, 2]), some_end=True)
    with pytest.raises(checks.SelfCheckError, match="within the first 2 tokens"):
        checks.check_endings(*endings([2, 3, 4], eos_id=None, shortest_prompt=2))


@pytest.mark.parametrize("recipe", ["sft", "reward", "dpo", "hypo"])
def test_data_without_eos_stops_the_run_before_it_starts(recipe, inputs, tmp_path):
    # Of a task whose completions should end with a token that none of them has, and could be longer.
    ground = dataclasses.replace(
        inputs.ground, eos_id=0, completion_length=inputs.ground.completion_length + 1
    )
    run = make_run(tmp_path / "run")
    strict = dataclasses.replace(inputs, ground=ground)
    with pytest.raises(checks.SelfCheckError, match=r"EOS token"):
        if recipe == "sft":
            sft.train(small(config.SftSection), ground, inputs.task, 0, run)
        elif recipe == "reward":
            reward.train(small(config.RewardSection), strict, run)
        else:
            module, settings, _ = CASES[recipe]
            module.train(settings, strict, run)
    assert not run.directory.exists()


def test_recipes_that_need_pairs_or_a_reward_model_say_so(inputs, tmp_path):
    run = make_run(tmp_path / "run")
    bare = dataclasses.replace(inputs, pairs=None, reward_model=None)
    for case in ("dpo", "hypo"):
        module, settings, _ = CASES[case]
        with pytest.raises(ValueError, match="was given none"):
            module.train(settings, bare, run)
    for case in ("online dpo hard", "ppo", "rebel", "rejection"):
        module, settings, _ = CASES[case]
        with pytest.raises(ValueError, match="no reward model was given"):
            module.train(settings, bare, run)
    with pytest.raises(ValueError, match="have no EOS"):
        ppo.train(small(config.PpoSection, missing_eos_penalty=1.0), inputs, run)


def test_pairs_drawn_hot_are_broader_and_their_reference_is_the_policys_own(inputs):
    drawn = {
        temperature: sampled_pairs(
            inputs.ground,
            inputs.task,
            inputs.policy,
            inputs.validation.take(slice(64)),
            seed=0,
            role="hot",
            tau=0.02,
            temperature=temperature,
        )
        for temperature in (1.0, 2.0)
    }
    cold, hot = (drawn[each].ref_chosen_logps for each in (1.0, 2.0))
    assert hot.mean() < cold.mean() - 0.5
    chosen, _ = drawn[2.0].sequences(inputs.ground.pad_id)
    logps = score_all(inputs.ground, inputs.policy, chosen)
    np.testing.assert_allclose(hot, logps, rtol=1e-4, atol=1e-4)


def test_hypo_deals_out_as_many_samples_as_pairs():
    with pytest.raises(ValueError, match="batch_size is 8 and on_policy_prompts 4"):
        small(config.HypoSection, num_microbatches=2)


# What the recipes compute.


def test_lengths_are_told_of_all_completions_and_of_those_that_ended():
    rollouts = some_rollouts(jnp.array([1.0, 3.0, 2.0, 2.0]))
    # Token 5 is the last of one completion of two tokens, and of one of three.
    numbers = policy_gradient.rollout_metrics(rollouts, None, group_size=2, eos_id=5)
    assert "objective/kl" not in numbers
    expected = {
        "reward": 2.0,
        "reward_std": math.sqrt(2) / 2,
        "frac_reward_zero_std": 0.5,
        "completions/mean_length": 11 / 4,
        "completions/clipped_ratio": 0.5,
        "completions/mean_terminated_length": 5 / 2,
        "completions/min_terminated_length": 2,
        "completions/max_terminated_length": 3,
        "val/contain_eos_token": 0.5,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(numbers[name], value, rtol=1e-6, err_msg=name)
    nobody = policy_gradient.rollout_metrics(rollouts, None, group_size=2, eos_id=8)
    assert nobody["completions/clipped_ratio"] == 1
    for name in ("mean", "min", "max"):
        assert nobody[f"completions/{name}_terminated_length"] == 0


def test_every_source_of_rewards_is_told_and_so_are_a_verifiers_errors(
    inputs, tmp_path, monkeypatch
):
    (tmp_path / "moody.py").write_text(
        "calls = []\n\ndef judge(prompt, completion):\n    calls.append(1)\n"
        "    if len(calls) % 4 == 0:\n        raise ValueError('enough')\n    return 2.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    section = config.VerifierSection(
        path="moody:judge", weight=0.5, error_reward=-6.0, max_error_share=0.3
    )
    sources = config.RewardSources(reward_model=0.25, verifier=section)
    plan = rounds.Sampling("told", prompts=4, samples=2)
    sample = rounds.Sampler(inputs, sources, plan, loop.Clock())
    # Not the first round, which would check the sampler too.
    rollouts, numbers = sample(inputs.policy, 1)
    assert numbers["verifier/error_share"] == 2 / 8
    np.testing.assert_allclose(numbers["rewards/judge/mean"], (6 * 1 - 2 * 3) / 8)
    np.testing.assert_allclose(
        numbers["rewards/judge/std"], np.std([1] * 6 + [-3] * 2, ddof=1), rtol=1e-6
    )
    told = numbers["rewards/judge/mean"] + numbers["rewards/reward_model/mean"]
    np.testing.assert_allclose(np.mean(rollouts.scored()), told, rtol=1e-5)


def test_equal_rewards_have_no_spread():
    """The mean of eight numbers 0.7 is another number, and their deviation not 0."""
    for value in (0.1, 0.3, 0.7):
        rewards = jnp.array([value] * 8 + [1.0] * 7 + [0.0])
        rollouts = Rollouts(
            jnp.ones((16, 2), jnp.int32),
            jnp.ones((16, 2), bool),
            jnp.zeros((16, 2)),
            rewards,
        )
        numbers = policy_gradient.rollout_metrics(
            rollouts, None, group_size=8, eos_id=None
        )
        assert numbers["frac_reward_zero_std"] == 0.5
        deviation = np.std([1.0] * 7 + [0.0], ddof=1)
        np.testing.assert_allclose(numbers["reward_std"], deviation / 2, rtol=1e-6)


def test_the_two_samples_of_a_prompt_regress_on_their_penalised_difference():
    rollouts = some_rollouts(jnp.array([1.0, 3.0, 2.0, 0.5]))
    ref_logps = rollouts.logps - 0.25
    batch = rebel.regression_pairs(rollouts, ref_logps, kl_coef=2.0)
    # Log-ratios are 0.25 a token: 3, 3, 2 and 3 tokens. The better of each pair is chosen.
    np.testing.assert_allclose(
        batch.margin, [(3 - 1.5) - (1 - 1.5), (2 - 1.0) - (0.5 - 1.5)], rtol=1e-6
    )
    np.testing.assert_allclose(batch.ref_chosen_logps, [-1.8, -0.9 - 1.0], rtol=1e-6)
    np.testing.assert_allclose(batch.ref_rejected_logps, [-0.6, -4.2], rtol=1e-6)
    np.testing.assert_array_equal(
        batch.chosen.tokens, rollouts.tokens[jnp.array([1, 2])]
    )
    np.testing.assert_array_equal(
        batch.rejected.tokens, rollouts.tokens[jnp.array([0, 3])]
    )


def test_hard_labels_take_best_and_worst_and_drop_ties():
    rollouts = some_rollouts(jnp.array([1.0, 3.0, 2.0, 2.0]))
    batch = online_dpo.hard_pairs(rollouts, 2)
    np.testing.assert_array_equal(batch.chosen.tokens[0], rollouts.tokens[1])
    np.testing.assert_array_equal(batch.rejected.tokens[0], rollouts.tokens[0])
    np.testing.assert_array_equal(batch.weight, [1, 0])
    whole = online_dpo.hard_pairs(rollouts, 4)
    np.testing.assert_array_equal(whole.chosen.tokens, rollouts.tokens[1:2])
    assert whole.margin == 2.0


def test_soft_labels_are_the_reward_models_probabilities():
    rollouts = some_rollouts(jnp.array([1.0, 3.0, 2.0, 2.0]))
    batch = online_dpo.soft_pairs(rollouts, 2)
    np.testing.assert_allclose(
        batch.chosen_probability, [1 / (1 + math.exp(-2)), 0.5], rtol=1e-6
    )
    np.testing.assert_array_equal(batch.margin, [2.0, 0.0])
    np.testing.assert_array_equal(
        batch.chosen.tokens, rollouts.tokens[jnp.array([1, 2])]
    )


def turned(batch):
    """The same pairs, the other completion of each called chosen."""
    probability = batch.chosen_probability
    return dataclasses.replace(
        batch,
        chosen=batch.rejected,
        rejected=batch.chosen,
        ref_chosen_logps=batch.ref_rejected_logps,
        ref_rejected_logps=batch.ref_chosen_logps,
        margin=-batch.margin,
        chosen_probability=None if probability is None else 1 - probability,
    )


@pytest.mark.parametrize("recipe", ["soft", "rebel"])
def test_which_of_a_pair_is_chosen_is_seen_by_its_metrics_and_not_by_its_loss(recipe):
    rollouts = some_rollouts(jnp.array([1.0, 3.0, 2.0, 0.5]))
    params = {"w": jnp.array([0.3, -0.2, 0.5, 0.1, 0.7, 0.2])}
    if recipe == "soft":
        loss = functools.partial(losses.soft_dpo_loss, beta=0.5)
        batch = dataclasses.replace(
            online_dpo.soft_pairs(rollouts, 2),
            ref_chosen_logps=jnp.array([-4.0, -5.0]),
            ref_rejected_logps=jnp.array([-4.5, -3.0]),
        )
    else:
        loss = functools.partial(losses.rebel_loss, eta=2.0)
        batch = rebel.regression_pairs(rollouts, rollouts.logps, kl_coef=0.0)
    objective = steps.preference_objective(unigram, loss=loss, beta=0.5)

    def found(batch):
        def value(params):
            mean, metrics = objective(params, batch)
            return mean.value, metrics

        (value, metrics), gradient = jax.value_and_grad(value, has_aux=True)(params)
        return value, gradient["w"], metrics["rewards/margins"].value

    value, gradient, margins = found(batch)
    same_value, same_gradient, other_margins = found(turned(batch))
    np.testing.assert_allclose(same_value, value, rtol=1e-5)
    np.testing.assert_allclose(same_gradient, gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(other_margins, -margins, rtol=1e-5)
    assert abs(margins) > 0.1


def hypo_batch(samples=8):
    rng = np.random.default_rng(3)

    def rows(count):
        mask = np.zeros((count, 5), bool)
        mask[:, 2:] = True
        return SequenceBatch(
            jnp.asarray(rng.integers(0, 4, (count, 5)), jnp.int32), jnp.asarray(mask)
        )

    pairs = PreferenceBatch(
        rows(4),
        rows(4),
        ref_chosen_logps=jnp.asarray(rng.normal(-4, 1, 4), jnp.float32),
        ref_rejected_logps=jnp.asarray(rng.normal(-4, 1, 4), jnp.float32),
    )
    logps = jnp.asarray(rng.normal(-4, 1, samples), jnp.float32)
    return pairs, rows(samples), logps


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_kl_of_a_round_is_that_of_the_policy_that_sampled(epochs, inputs, tmp_path):
    settings = small(
        config.OnlineDpoSection, steps=1, epochs=epochs, optimizer=optimizer(1e-2)
    )
    run = make_run(tmp_path / "run")
    online_dpo.train(settings, inputs, run)
    told = metrics_of(run)[0]
    # Round 0 samples from the reference itself.
    assert abs(told["objective/kl"]) < 1e-4
    assert abs(told["objective/non_score_reward"]) < 1e-4
    np.testing.assert_allclose(told["objective/rlhf_reward"], told["reward"], atol=1e-4)


def test_the_kl_is_not_told_of_samples_of_the_starting_policy(inputs, tmp_path):
    """They estimate −KL(π_ref ‖ π), which falls while the policy goes away."""
    module, settings, _ = CASES["online dpo once"]
    run = make_run(tmp_path / "run")
    module.train(settings, inputs, run)
    assert not any(OF_THE_KL & set(line) for line in metrics_of(run))
    assert "eval_kl" in metrics_of(run)[-1]


def gradient_of(settings, batch, params):
    loss, normaliser = policy_gradient.make_policy_loss(
        types.SimpleNamespace(completion_length=4), settings
    )
    objective = steps.policy_gradient_objective(
        unigram, loss=loss, normaliser=normaliser
    )
    return jax.grad(lambda params: objective(params, batch)[0].value)(params)["w"]


def test_rloo_of_several_epochs_corrects_for_the_policy_that_sampled():
    settings = {
        1: small(config.PolicyGradientSection),
        2: small(config.PolicyGradientSection, epochs=2, epsilon=50.0),
    }
    params = {"w": jnp.array([0.3, -0.2, 0.5, 0.1, 0.7, 0.2])}
    rollouts = some_rollouts(jnp.array([1.0, 3.0, 2.0, 0.5]))
    mask = rollouts.completion_mask
    logps = jnp.where(mask, unigram(params, rollouts.tokens), 0.0)
    advantages = policy_gradient.make_advantages(settings[1], rollouts.rewards)

    def gradients(old_logps):
        batch = steps.policy_batch(
            dataclasses.replace(rollouts, logps=old_logps), advantages
        )
        return [gradient_of(settings[epochs], batch, params) for epochs in (1, 2)]

    # The policy that sampled: the same gradient.
    one, several = gradients(logps)
    np.testing.assert_allclose(several, one, rtol=1e-5, atol=1e-6)
    # Another one: each completion weighed by its ratio.
    moved = jnp.array([0.1, -0.2, 0.3, 0.0])[:, None] * jnp.ones(4)
    ratio = jnp.exp(jnp.sum(jnp.where(mask, moved, 0.0), axis=1))
    batch = steps.policy_batch(
        dataclasses.replace(rollouts, logps=logps), advantages * ratio
    )
    _, several = gradients(logps - moved)
    np.testing.assert_allclose(
        several, gradient_of(settings[1], batch, params), rtol=1e-5, atol=1e-6
    )
    assert not np.allclose(several, one, rtol=1e-2)


def unigram(params, tokens):
    logps = jax.nn.log_softmax(params["w"])[tokens]
    return logps.at[:, 0].set(0.0)


def test_hypo_is_dpo_on_pairs_plus_the_gradient_of_the_kl_on_samples():
    params = {"w": jnp.array([0.3, -0.2, 0.5, 0.1])}
    pairs, samples, ref_logps = batch = hypo_batch()

    def loss(params):
        total, _ = hypo.hypo_objective(unigram, beta=0.5, kl_coef=0.3)(params, batch)
        return total.value

    def by_hand(params):
        def logps(rows):
            tokens = jnp.where(rows.completion_mask, unigram(params, rows.tokens), 0.0)
            return jnp.sum(tokens, axis=1)

        gap = (logps(pairs.chosen) - pairs.ref_chosen_logps) - (
            logps(pairs.rejected) - pairs.ref_rejected_logps
        )
        sampled = logps(samples)
        ratio = jax.lax.stop_gradient(sampled - ref_logps)
        value = -jnp.mean(jax.nn.log_sigmoid(0.5 * gap)) + 0.3 * jnp.mean(ratio)
        surrogate = 0.3 * jnp.mean(ratio * sampled)
        return value + surrogate - jax.lax.stop_gradient(surrogate)

    found, expected = (
        jax.value_and_grad(loss)(params),
        jax.value_and_grad(by_hand)(params),
    )
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1]["w"], expected[1]["w"], rtol=1e-5, atol=1e-6)


def test_hypo_does_not_depend_on_micro_batches():
    params = {"w": jnp.array([0.3, -0.2, 0.5, 0.1])}
    objective = hypo.hypo_objective(unigram, beta=0.5, kl_coef=0.3)
    tx = optax.sgd(0.1)
    results = []
    for count in (1, 2):
        step = steps.make_train_step(objective, tx, num_microbatches=count)
        results.append(step(steps.init_train_state(params, tx), hypo_batch(4)))
    (one, one_metrics), (two, two_metrics) = results
    np.testing.assert_allclose(one.params["w"], two.params["w"], rtol=1e-6)
    for name in one_metrics:
        np.testing.assert_allclose(
            one_metrics[name], two_metrics[name], rtol=1e-5, err_msg=name
        )


def test_best_of_n_keeps_the_best_and_reports_the_kl_bound(inputs):
    prompts = inputs.validation.take(slice(40))
    settings = config.BestOfNSection(n=4, rewards=GOLD)
    found = best_of_n.evaluate(settings, inputs, prompts, role="bon")
    best = best_of_n.winners(inputs, GOLD, prompts, n=4, role="bon")
    np.testing.assert_array_equal(found.gold, best.rewards)
    np.testing.assert_allclose(found.kl, math.log(4) - 3 / 4, rtol=1e-6)
    one = evaluate_policy(
        inputs.ground, inputs.task, inputs.policy, inputs.policy, prompts, seed=0
    )
    assert found.gold.mean() > one.gold.mean() + 0.2

    # The first samples of a prompt are the same whatever n, so more of them can only help.
    more = best_of_n.winners(inputs, GOLD, prompts, n=8, role="bon")
    assert (more.rewards >= found.gold).all()


def test_best_of_n_from_another_policy_adds_how_far_that_one_is(inputs):
    prompts = inputs.validation.take(slice(20))
    other = dataclasses.replace(inputs, reference=moved(inputs.policy))
    settings = config.BestOfNSection(n=2, rewards=GOLD)
    found = best_of_n.evaluate(settings, other, prompts, role="bon")
    best = best_of_n.winners(inputs, GOLD, prompts, n=2, role="bon")
    rows = SequenceBatch(best.tokens, best.completion_mask)
    own, ref = (
        score_all(inputs.ground, params, rows)
        for params in (inputs.policy, other.reference)
    )
    np.testing.assert_allclose(
        found.kl, math.log(2) - 1 / 2 + own - ref, rtol=1e-3, atol=1e-4
    )


def test_rewards_of_many_rows_do_not_depend_on_the_parts(inputs):
    prompts = inputs.prompts.take(slice(5)).repeat(2)
    rollouts = best_of_n.winners(inputs, GOLD, prompts, n=2, role="parts")
    rewards = make_rewards(inputs.ground, BOTH, inputs.task, inputs.reward_model)
    whole, parts = (
        reward_rows(
            dataclasses.replace(inputs.ground, rows_per_call=most),
            rewards,
            rollouts,
            prompts,
        )
        for most in (512, 4)
    )
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)
    assert np.std(whole) > 0


# Learning.


def optimizer(learning_rate):
    return config.OptimizerSection(learning_rate=learning_rate)


LEARNS = {
    "dpo": (
        dpo,
        config.DpoSection(
            steps=300, beta=0.1, nll_weight=1.0, optimizer=optimizer(3e-3)
        ),
    ),
    "online dpo": (
        online_dpo,
        config.OnlineDpoSection(
            steps=60,
            samples_per_prompt=4,
            beta=0.3,
            rewards=GOLD,
            optimizer=optimizer(3e-3),
        ),
    ),
    "rloo": (
        policy_gradient,
        config.PolicyGradientSection(
            steps=60,
            samples_per_prompt=4,
            kl_coef=0.03,
            rewards=GOLD,
            optimizer=optimizer(5e-3),
        ),
    ),
    "ppo": (
        ppo,
        config.PpoSection(
            steps=60,
            samples_per_prompt=4,
            kl_coef=0.03,
            rewards=GOLD,
            optimizer=optimizer(3e-3),
        ),
    ),
    "rebel learns": (
        rebel,
        config.RebelSection(
            steps=60,
            prompts_per_step=64,
            eta=4.0,
            kl_coef=0.03,
            rewards=GOLD,
            optimizer=optimizer(3e-3),
        ),
    ),
    "hypo learns": (
        hypo,
        config.HypoSection(
            steps=120, beta=0.3, kl_coef=0.02, optimizer=optimizer(1e-3)
        ),
    ),
    "rejection learns": (
        rejection,
        config.RejectionSection(steps=60, n=8, rewards=GOLD, optimizer=optimizer(3e-3)),
    ),
}


def test_gold_rises_clearly_from_random_parameters_to_sft(inputs):
    start = inputs.ground.init_policy(role_key(0, "init"))
    before, after = (
        evaluate_policy(
            inputs.ground, inputs.task, params, start, inputs.validation, seed=1
        ).gold.mean()
        for params in (start, inputs.policy)
    )
    assert after > before + 0.3


@pytest.mark.parametrize("name", marked(LEARNS))
def test_gold_rises_clearly(name, inputs, tmp_path):
    module, settings = LEARNS[name]
    # Judged on the prompts that were trained on: whether it learned is the question here, not whether it generalises.
    run = make_run(tmp_path / "run")
    trained = module.train(settings, inputs, run, select="last")

    def gold(params):
        return evaluate_policy(
            inputs.ground,
            inputs.task,
            params,
            inputs.reference,
            inputs.prompts.repeat(8),
            seed=1,
        ).gold.mean()

    before, after = gold(inputs.policy), gold(trained.params)
    assert after > before + 0.08

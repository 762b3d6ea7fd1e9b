"""What a config may say, and that everything else is refused with the value, the rule and a way out."""

import importlib.util
import math
import os
import subprocess
import sys

import pytest
import yaml

from gvjax import config
from gvjax.config import reading

PG = {"recipe": "policy_gradient"}
RUN = {
    "run_dir": "runs/x",
    "task": {"name": "tour"},
    "model": {"embed_dim": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 8},
    "settings": {"recipe": "sft"},
}
ONLINE = {**RUN, "start": "runs/sft", "reward_model": "runs/reward"}
OFFLINE = {**RUN, "start": "runs/sft", "pairs": {}}
STUDY = {
    "study": "s",
    "run_dir": "runs/s",
    "seeds": [1, 2],
    "task": {"name": "tour"},
    "model": RUN["model"],
    "arms": {
        "DPO": {"road": "offline", "settings": {"recipe": "dpo"}},
        "RLOO": {"road": "online", "settings": PG},
    },
}


def write(tmp_path, data) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return str(path)


def load(tmp_path, data, *overrides):
    return config.load(write(tmp_path, data), overrides)


def online(**settings):
    return {**ONLINE, "settings": {**PG, **settings}}


def offline(**settings):
    return {**OFFLINE, "settings": {"recipe": "dpo", **settings}}


def study_with(**fields):
    return {**STUDY, **fields}


def arm_with(name, **fields):
    arms = {**STUDY["arms"], name: {**STUDY["arms"].get(name, {}), **fields}}
    return study_with(arms=arms)


def best_of_n(**fields):
    return {**ONLINE, "settings": {"recipe": "best_of_n"}, **fields}


REFUSED = {
    # Keys.
    "unknown key": ({**RUN, "sead": 1}, "sead is not a key; did you mean seed"),
    "unknown nested key": (
        {**RUN, "settings": {"recipe": "sft", "optimizer": {"learning_rat": 1.0}}},
        "settings.optimizer.learning_rat is not a key; did you mean learning_rate",
    ),
    "a key of another recipe": (offline(epsilon=0.1), "settings.epsilon is not a key"),
    "missing key": ({"task": RUN["task"]}, "run_dir is missing"),
    "unknown recipe": ({**RUN, "settings": {"recipe": "dpoo"}}, "dpoo"),
    "repeated key": ("run_dir: a\nseed: 1\nseed: 2\n", "'seed' stands twice"),
    "no mapping": ("- 1\n", "holds no mapping"),
    "no YAML": ("a: [1", "is not YAML"),
    # Types.
    "float for int": (offline(steps=1.5), "settings.steps is 1.5"),
    "bool for int": (offline(steps=True), "settings.steps is True"),
    "text for a number": (offline(beta="large"), "settings.beta is 'large'"),
    "number for a bool": (
        {**RUN, "logging": {"tensorboard": 1}},
        "logging.tensorboard",
    ),
    "no is text": (
        "run_dir: a\nlogging: {tensorboard: no}\n",
        "logging.tensorboard is 'no'",
    ),
    "yes in a number's place": ("run_dir: a\nseed: yes\n", "seed is 'yes'"),
    # Ranges.
    "no steps": (offline(steps=0), "settings.steps is 0"),
    "negative beta": (offline(beta=-1.0), "settings.beta is -1.0"),
    "negative seed": ({**RUN, "seed": -1}, "seed is -1"),
    "momentum of 1": (
        {**RUN, "settings": {"recipe": "sft", "optimizer": {"b1": 1.0}}},
        "settings.optimizer.b1 is 1.0",
    ),
    "more errors than calls": (
        online(rewards={"verifier": {"path": "a:b", "max_error_share": 1.5}}),
        "max_error_share is 1.5",
    ),
    "a bucket": (
        {**RUN, "run_dir": "gs://bucket/run"},
        "run_dir: gs://bucket/run is a bucket's address, but a run is written as files",
    ),
    "a bucket of a study": (study_with(run_dir="gs://bucket/run"), "mount the bucket"),
    # Sizes that do not fit each other.
    "micro-batches": (
        offline(batch_size=30, num_microbatches=4),
        "30 rows is not divisible by num_microbatches 4; use 28 or 32",
    ),
    "micro-batches of rollouts": (
        online(prompts_per_step=3, samples_per_prompt=3, num_microbatches=2),
        "9 rows is not divisible by num_microbatches 2; use 8 or 10",
    ),
    "warm-up as long as the run": (
        online(steps=4, epochs=2, optimizer={"warmup_steps": 8}),
        "warmup_steps is 8 but the run makes 8 updates",
    ),
    "odd samples for soft labels": (
        {
            **ONLINE,
            "settings": {
                "recipe": "online_dpo",
                "labels": "soft",
                "samples_per_prompt": 5,
            },
        },
        "samples_per_prompt is 5.*use 4 or 6",
    ),
    "one sample and a baseline of the others": (
        online(samples_per_prompt=1),
        "rloo compares the samples of a prompt",
    ),
    "a biased KL": (
        online(kl_estimator="k3"),
        "kl_estimator k3 in the reward is biased",
    ),
    "a KL without gradient": (online(kl_in="loss"), "would do nothing; use k2 or k3"),
    "micro-batches of unequal parts": (
        {
            **OFFLINE,
            "settings": {
                "recipe": "hypo",
                "batch_size": 8,
                "on_policy_prompts": 4,
                "num_microbatches": 2,
            },
        },
        "must be equal",
    ),
    # Options that nothing reads.
    "a clip for rloo": (
        online(epsilon=0.1),
        "epsilon is given, but rloo does not clip",
    ),
    "epochs without a correction": (
        online(algorithm="reinforce", epochs=2),
        "reinforce does not correct for that; use epochs: 1, or rloo",
    ),
    "a KL divided by lengths": (
        online(epochs=2, kl_in="loss", kl_estimator="k3"),
        "epochs is 2: rloo then averages",
    ),
    "a clip for reinforce": (
        online(algorithm="reinforce", epsilon_high=0.1),
        "epsilon_high is given, but reinforce",
    ),
    "a lower clip for cispo": (
        online(algorithm="cispo", epsilon=0.1),
        "cispo bounds the ratio from above only",
    ),
    "an estimator of no KL": (
        online(kl_coef=0.0, kl_estimator="k1"),
        "kl_estimator is given, but kl_coef is 0",
    ),
    "a place for no KL": (
        online(kl_coef=0.0, kl_in="loss", kl_estimator="k2"),
        "kl_in",
    ),
    "a clip of an untrained critic": (
        {
            **ONLINE,
            "settings": {"recipe": "ppo", "value_coef": 0.0, "value_epsilon": 0.1},
        },
        "value_epsilon is given, but value_coef is 0",
    ),
    "a time limit for gold": (
        online(rewards={"verifier": {"path": "gold", "time_limit": 1.0}}),
        "time_limit is given, but the task's own reward",
    ),
    "a verifier that does not count": (
        online(rewards={"verifier": {"weight": 0.0}}),
        "weight is 0.0",
    ),
    "no reward": (online(rewards={"reward_model": 0.0}), "no reward is left"),
    "beta twice": (
        offline(beta=0.1, loss_options={"beta": 0.2}),
        "loss_options.beta has a field of its own",
    ),
    "test prompts of one recipe": (
        {**offline(), "evaluation": {"test_prompts": 5}},
        "evaluation.test_prompts is not a key",
    ),
    "validation of sft": ({**RUN, "evaluation": {}}, "recipe sft is not judged"),
    "selection of sft": ({**RUN, "select": "best"}, "select is given, but recipe sft"),
    "selection of a reward model": (
        {**OFFLINE, "settings": {"recipe": "reward"}, "select": "best"},
        "early_stop keeps the best",
    ),
    "samples of a reward model": (
        {
            **OFFLINE,
            "settings": {"recipe": "reward"},
            "logging": {"sample_every": 5},
        },
        "sample_every is given, but a reward model has no samples",
    ),
    **{
        f"{name} of best-of-n": (best_of_n(**{name: value}), f"{name} is given, but")
        for name, value in {
            "select": "best",
            "logging": {},
            "checkpoints": {},
        }.items()
    },
    "a step limit of best-of-n": (
        best_of_n(timeouts={"step": 5.0}),
        "step is given, but recipe best_of_n trains nothing",
    ),
    "no heartbeat": ({**RUN, "timeouts": {"heartbeat": 0}}, "timeouts.heartbeat is 0"),
    "a start for sft": ({**RUN, "start": "runs/y"}, "recipe sft does not use start"),
    "no start": ({**RUN, "settings": PG}, "policy_gradient needs start"),
    "no pairs": ({**offline(), "pairs": None}, "dpo needs pairs"),
    "no reward model": ({**online(), "reward_model": None}, "needs reward_model"),
    "a reward model for gold": (
        online(rewards={"reward_model": 0.0, "verifier": {}}),
        "does not use reward_model",
    ),
    # Studies.
    "seeds twice": (study_with(seeds=[1, 1]), "repeat"),
    "no seeds": (study_with(seeds=[]), "seeds"),
    "no offline arm": (
        study_with(arms={"RLOO": STUDY["arms"]["RLOO"]}),
        "no arm takes the offline road",
    ),
    "a recipe on the wrong road": (
        arm_with("RLOO", road="offline"),
        "arms.RLOO.road is offline, but its recipe is policy_gradient",
    ),
    "an arm called sft": (arm_with("sft", **STUDY["arms"]["DPO"]), "may not be called"),
    "an unknown start": (arm_with("RLOO", start="DOP"), "did you mean 'DPO'"),
    "a start that has one": (
        study_with(
            arms={
                **STUDY["arms"],
                "A": {**STUDY["arms"]["RLOO"], "start": "DPO"},
                "B": {**STUDY["arms"]["RLOO"], "start": "A"},
            }
        ),
        "which itself starts from an arm",
    ),
    "augmented data for selection": (
        arm_with(
            "b",
            road="selection",
            data="augmented",
            settings={"recipe": "best_of_n", "n": 2},
        ),
        "which only dpo, online_dpo",
    ),
    "ranked samples for online arms only": (
        {
            **arm_with("RLOO", data="augmented"),
            "augmentation": {"prompts": 8, "samples_per_prompt": 4},
        },
        "online and draw their own samples",
    ),
    "augmentation of nothing": (
        study_with(augmentation={}),
        "no arm has data: augmented",
    ),
    "an empty sweep": (arm_with("DPO", sweep=[]), "sweep is empty"),
    "a sweep of another recipe": (
        arm_with("DPO", sweep=[{"gamma": 0.5}]),
        "gamma is not a key",
    ),
    "a sweep of what nothing reads": (
        arm_with("RLOO", sweep=[{"epsilon": 0.5}]),
        "rloo does not clip",
    ),
    "selection of the best of n": (
        arm_with(
            "b", road="selection", select="best", settings={"recipe": "best_of_n"}
        ),
        "best_of_n trains nothing",
    ),
    "samples of a study": (
        study_with(logging={"sample_every": 5}),
        "studies show their samples in the report",
    ),
    "a twin of the same name": (
        study_with(twins=[{"task": {"name": "tour"}}]),
        "two tasks of the study are called tour",
    ),
    "a twin's unknown arm": (
        study_with(twins=[{"task": {"name": "t"}, "arms": ["RLO"]}]),
        "did you mean 'RLOO'",
    ),
    "a twin without the start of its arm": (
        study_with(
            arms={
                **STUDY["arms"],
                "late": {**STUDY["arms"]["RLOO"], "start": "DPO"},
            },
            twins=[{"task": {"name": "t"}, "arms": ["late"]}],
        ),
        "which starts from DPO; add that",
    ),
    "a contrast of an unknown arm": (
        study_with(contrasts=[{"a": "RLOO", "b": "DP"}]),
        "there is no 'DP'",
    ),
    "a contrast on an unknown task": (
        study_with(contrasts=[{"a": "RLOO", "b": "DPO", "task": "tuor"}]),
        "did you mean 'tour'",
    ),
    "a contrast where an arm is not run": (
        study_with(
            twins=[{"task": {"name": "t"}, "arms": ["RLOO"]}],
            contrasts=[{"a": "RLOO", "b": "best offline", "task": "t"}],
        ),
        "compares best offline on t, where it is not run",
    ),
    "a contrast with itself": (
        study_with(contrasts=[{"a": "DPO", "b": "DPO"}]),
        "with itself",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_run_is_refused(case, tmp_path):
    data, message = REFUSED[case]
    with pytest.raises(config.ConfigError, match=message):
        load(tmp_path, data)


@pytest.mark.parametrize("data", [RUN, online(), offline(), best_of_n(), STUDY])
def test_the_bases_of_these_cases_are_fine(data, tmp_path):
    load(tmp_path, data)


def test_every_problem_is_named_at_once(tmp_path):
    with pytest.raises(config.ConfigError) as caught:
        load(tmp_path, {**RUN, "sead": 1, "seed": "x"})
    assert "sead is not a key" in str(caught.value)
    assert "seed is 'x'" in str(caught.value)


def test_a_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(config.ConfigError, match="No such file"):
        config.load(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-6", 1e-6),
        ("1E3", 1000.0),
        ("1.5e-3", 1.5e-3),
        ("3", 3),
        ("3.0", 3.0),
        (".inf", math.inf),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("null", None),
        ("'3'", "3"),
        ("20_000", 20000),
        ("-4", -4),
        ("010", "010"),
        ("1:30", "1:30"),
        ("0x1f", "0x1f"),
        ("2026-10-01", "2026-10-01"),
    ],
)
def test_scalars_are_read_as_they_look(text, value):
    read = yaml.load(text, Loader=reading.Loader)
    assert read == value
    assert type(read) is type(value)


def test_a_learning_rate_may_be_written_with_an_exponent_or_as_an_integer(tmp_path):
    text = (
        "settings: {recipe: sft, optimizer: {learning_rate: %s, max_grad_norm: .inf}}"
    )
    base = yaml.safe_dump({k: v for k, v in RUN.items() if k != "settings"})
    for written, value in (("5e-4", 5e-4), ("1", 1.0)):
        optimizer = load(tmp_path, base + text % written).settings.optimizer
        assert optimizer.learning_rate == value
        assert optimizer.max_grad_norm == math.inf


@pytest.mark.parametrize("field", ["learning_rate", "weight_decay", "eps"])
def test_a_step_size_is_finite(field, tmp_path):
    with pytest.raises(config.ConfigError, match=f"{field}.*finite"):
        load(tmp_path, offline(optimizer={field: math.inf}))


def test_an_optimizer_given_in_part_keeps_the_recipes_own_values(tmp_path):
    optimizer = load(
        tmp_path, offline(optimizer={"schedule": "linear"})
    ).settings.optimizer
    own = config.DpoSection().optimizer
    assert optimizer == own.model_copy(update={"schedule": "linear"})


def test_a_config_lies_over_the_one_it_extends(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(STUDY))
    (tmp_path / "more").mkdir()
    over = {"extends": "../base.yaml", "run_dir": "runs/over", "seeds": [7]}
    over["arms"] = {"HyPO": {"road": "offline", "settings": {"recipe": "hypo"}}}
    path = tmp_path / "more" / "over.yaml"
    path.write_text(yaml.safe_dump(over))
    found = config.load(path, ["sft.steps=5"])
    assert list(found.arms) == ["DPO", "RLOO", "HyPO"]
    # A list takes the place of the one below; what is not said is the base's.
    assert (found.seeds, found.run_dir, found.study) == ((7,), "runs/over", "s")
    assert found.sft.steps == 5
    path.write_text(yaml.safe_dump({**over, "extends": "../bse.yaml"}))
    with pytest.raises(config.ConfigError, match=r"cannot read the config .*bse\.yaml"):
        config.load(path)
    path.write_text(yaml.safe_dump({**over, "extends": "over.yaml"}))
    with pytest.raises(config.ConfigError, match="extends itself"):
        config.load(path)
    path.write_text(yaml.safe_dump({**over, "extends": ["../base.yaml"]}))
    with pytest.raises(config.ConfigError, match="name one file"):
        config.load(path)


def test_overrides_win_make_sections_and_are_read_as_yaml(tmp_path):
    settings = load(
        tmp_path,
        RUN,
        "seed=7",
        "settings.optimizer.learning_rate=1e-6",
        "logging.wandb_project=null",
        "mesh.data=2",
    )
    assert (settings.seed, settings.mesh.data) == (7, 2)
    assert settings.settings.optimizer.learning_rate == 1e-6
    assert settings.logging.wandb_project is None


@pytest.mark.parametrize(
    "override, message",
    [
        ("seed", "not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("seed.deep=3", "seed is a value, not a section"),
        ("seed=[1", "is not YAML"),
        ("sead=3", "did you mean seed"),
        ("settings.step=3", "settings.step is not a key; did you mean steps"),
    ],
)
def test_overrides_are_as_strict_as_files(override, message, tmp_path):
    with pytest.raises(config.ConfigError, match=message):
        load(tmp_path, {**RUN, "seed": 1}, override)


def test_a_sweep_changes_what_it_names_and_nothing_else(tmp_path):
    sweep = [{"beta": 3.0}, {"optimizer": {"learning_rate": 1e-5}}]
    settings = {"recipe": "dpo", "steps": 7, "optimizer": {"schedule": "cosine"}}
    arm = load(tmp_path, arm_with("DPO", settings=settings, sweep=sweep)).arms["DPO"]
    first, second = config.arm_settings(arm)
    assert first == arm.settings.model_copy(update={"beta": 3.0})
    assert (second.steps, second.beta) == (7, None)
    assert second.optimizer.learning_rate == 1e-5
    assert second.optimizer.schedule == "cosine"


def test_gspo_has_a_clip_of_its_own_that_a_sweep_leaves_behind(tmp_path):
    settings = {**PG, "algorithm": "gspo"}
    sweep = [{}, {"epsilon": 0.1}, {"algorithm": "grpo"}]
    arm = load(tmp_path, arm_with("RLOO", settings=settings, sweep=sweep)).arms["RLOO"]
    clips = [tried.epsilon for tried in config.arm_settings(arm)]
    assert clips == [3e-4, 0.1, 0.2]
    assert config.PolicyGradientSection(epochs=2, epsilon=0.1).epsilon == 0.1


def test_a_sweep_may_switch_off_an_option_that_nobody_asked_for(tmp_path):
    arm = load(tmp_path, arm_with("RLOO", sweep=[{"kl_coef": 0.0}])).arms["RLOO"]
    assert config.arm_settings(arm)[0].kl_coef == 0


def test_a_kept_config_is_read_again_though_it_spells_out_unused_fields(tmp_path):
    settings = load(tmp_path, online())
    text = settings.model_dump_json()
    assert config.reread(text) == settings
    with pytest.raises(ValueError, match="rloo does not clip"):
        config.RunConfig.model_validate_json(text)


def test_weights_and_biases_is_refused_where_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(config.ConfigError, match=r"pip install 'gvjax\[wandb\]'"):
        load(tmp_path, RUN, "logging.wandb_project=mine")


def test_hashes_follow_values_and_not_their_spelling(tmp_path):
    plain = config.config_hash(load(tmp_path, RUN))
    assert plain == config.config_hash(load(tmp_path, RUN, "seed=0"))
    assert plain != config.config_hash(load(tmp_path, RUN, "seed=1"))


def test_import_paths():
    assert config.import_object("math:sqrt") is math.sqrt
    for path in ("math", "math:no_such", "no_such_module:x"):
        with pytest.raises(config.ConfigError, match=r"import"):
            config.import_object(path)


def test_a_bad_config_is_refused_before_any_device_is_looked_for(tmp_path):
    path = write(tmp_path, {**RUN, "sead": 1})
    # A platform that does not exist: whoever asks jax for devices fails.
    done = subprocess.run(
        [sys.executable, "-m", "gvjax", "run", path],
        env={**os.environ, "JAX_PLATFORMS": "nowhere"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 64
    assert "did you mean seed" in done.stderr
    assert "Traceback" not in done.stderr


DATASET = {
    "name": "rows",
    "rows": {"source": "jsonl", "path": "rows.jsonl"},
    "max_prompt": 8,
    "max_completion": 8,
    "gold": "number",
}


def gap_with(**fields):
    return {"gap": "g", **{name: STUDY[name] for name in ("run_dir", "seeds", "task", "model")}, **fields}  # fmt: skip


@pytest.mark.parametrize(
    "data, part",
    [
        (study_with(twins=[{"task": {"name": "hidden_goals"}}, {"task": DATASET}]), "twins"),
        (gap_with(controls=[{"task": {"name": "lcs"}}, {"task": DATASET}]), "controls"),
    ],
    ids=["twins", "controls"],
)  # fmt: skip
def test_every_dataset_has_the_tokenizer_beside_the_weights(data, part, tmp_path):
    found = load(tmp_path, {**data, "model": {"checkpoint": "weights"}})
    assert getattr(found, part)[1].task.tokenizer == "weights"
    given = [{"task": {**DATASET, "tokenizer": "my"}}]
    found = load(tmp_path, {**data, "model": {"checkpoint": "weights"}, part: given})
    assert getattr(found, part)[0].task.tokenizer == "my"
    with pytest.raises(
        config.ConfigError, match=f"{part}.1.task.tokenizer is not given"
    ):
        load(tmp_path, data)


@pytest.mark.parametrize(
    "rest",
    [
        "settings: {recipe: sft, steps: 100, batch_size: 16}",
        "start: runs/sft\npairs: {}\nsettings: {recipe: reward, steps: 100}",
        "start: runs/sft\npairs: {}\nsettings: {recipe: dpo, steps: 100, beta: 0.1}",
        "start: runs/sft\nreward_model: runs/reward\nsettings: {recipe: online_dpo, steps: 100}",
        "start: runs/sft\nreward_model: runs/reward\nsettings: {recipe: policy_gradient, algorithm: grpo}",
    ],
    ids=["sft", "reward", "dpo", "online_dpo", "grpo"],
)
def test_ten_lines_are_a_run_of_ones_own_weights_and_rows(rest, tmp_path):
    text = f"""\
run_dir: runs/mine
model: {{checkpoint: models/smollm2}}
task:
  name: mine
  rows: {{source: jsonl, path: pairs.jsonl}}
  max_prompt: 512
  max_completion: 128
{rest}
"""
    assert len(text.splitlines()) <= 10
    assert load(tmp_path, text).run_dir == "runs/mine"

"""What the verbs of the command line do."""

import argparse
import pathlib

import jax
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from scipy import special

from gvjax import config, distributed, metrics
from gvjax.checkpoint import CheckpointError, CheckpointMismatch, DirectoryError
from gvjax.gap import statistics
from gvjax.gap.compare import compare as compare_roads
from gvjax.gap.gap import measure
from gvjax.gap.judging import LabelsWanted
from gvjax.gap.progress import check_together
from gvjax.gap.stages import BusyError, StageError, code_fingerprint
from gvjax.judges.endpoint import BudgetError, JudgeError
from gvjax.judges.verifier import VerifierError
from gvjax.recipes import reward, single
from gvjax.recipes.checks import SelfCheckError
from gvjax.recipes.dataset import Dataset
from gvjax.recipes.evaluation import evaluate_margins
from gvjax.recipes.loop import NonFiniteError, PreemptedError
from gvjax.recipes.pairs import implicit_margins
from gvjax.recipes.rows import role_rng
from gvjax.tasks.task import Split
from gvjax.usage import ExitCode

EXPECTED = (
    BusyError,
    CheckpointError,
    JudgeError,
    NonFiniteError,
    SelfCheckError,
    StageError,
    VerifierError,
)
"""Errors whose message says all; a traceback would hide it."""

REFUSED = (
    config.ConfigError,
    CheckpointMismatch,
    DirectoryError,
    BudgetError,
)
"""The same, where starting again changes nothing: what restarts a program must leave it."""


def compare(arguments: argparse.Namespace) -> int:
    """Both roads on one task."""
    settings = config.load(arguments.config, arguments.overrides)
    if not isinstance(settings, config.StudyConfig):
        raise _other_verb(arguments.config, settings)
    console = _joined(settings)
    try:
        compare_roads(settings, console)
    except PreemptedError as preempted:
        console.print(str(preempted), highlight=False)
        return ExitCode.PREEMPTED
    return 0


def gap(arguments: argparse.Namespace) -> int:
    """The generation–verification gap of one task, with advice."""
    settings = config.load(arguments.config, arguments.overrides)
    if not isinstance(settings, config.GapConfig):
        raise _other_verb(arguments.config, settings)
    console = _joined(settings)
    try:
        measure(settings, console)
    except (LabelsWanted, PreemptedError) as waiting:
        console.print(str(waiting), highlight=False)
        return ExitCode.PREEMPTED
    return 0


def _joined(settings: config.StudyConfig | config.GapConfig) -> Console:
    """As `_meet`, for what has stages."""
    with config.refusing():
        check_together(settings, distributed.promised())
    return _meet(settings, code_fingerprint())


def _meet(
    settings: config.RunConfig | config.StudyConfig | config.GapConfig, more: str
) -> Console:
    """Joins the other processes, if there are any, and returns where this one may print: only the first is heard.

    Args:
      settings: the same on all; they must all see its run_dir.
      more: what else must be the same.

    Raises:
      ConfigError: they differ, or do not share the directory.
    """
    distributed.initialize(
        heartbeat_timeout_s=settings.timeouts.heartbeat,
        initialization_timeout_s=settings.timeouts.arrival,
    )
    with config.refusing():
        same = f"{config.config_hash(settings)} {more}"
        distributed.assert_same_on_all_hosts("config", same)
        distributed.assert_shared(pathlib.Path(settings.run_dir))
    return Console(quiet=jax.process_index() != 0)


def run(arguments: argparse.Namespace) -> int:
    """One recipe, by as many processes as the environment promises."""
    settings = config.load(arguments.config, arguments.overrides)
    if not isinstance(settings, config.RunConfig):
        raise _other_verb(arguments.config, settings)
    # Only now: a wrong config needs no device, and no other process.
    console = _meet(settings, str(sorted(arguments.force)))
    bar = Progress(
        TextColumn(settings.settings.recipe),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        row = bar.add_task("run", total=None, numbers="")

        def progress(done, total, shown):
            numbers = "  ".join(f"{name} {value:.3g}" for name, value in shown.items())
            bar.update(row, completed=done, total=total, numbers=numbers)
            if not console.is_terminal and (done % 100 == 0 or done == total):
                console.print(f"{done}/{total}  {numbers}", highlight=False)

        try:
            result = single.run(
                settings,
                progress=progress,
                show=console.print,
                force=arguments.force,
            )
        except PreemptedError as preempted:
            console.print(str(preempted), highlight=False)
            return ExitCode.PREEMPTED
    shown = {name: value for name, value in result.items() if name != "curve"}
    console.print("  ".join(f"{name} {value:.4g}" for name, value in shown.items()))
    if shares := _shares(pathlib.Path(settings.run_dir)):
        console.print(f"time of a round: {shares}", highlight=False)
    console.print(f"kept in {settings.run_dir}", highlight=False)
    return 0


def _other_verb(path: str, settings: config.Section) -> config.ConfigError:
    """What to say of a config that another command runs."""
    what, verb = "one recipe", "run"
    if isinstance(settings, config.StudyConfig):
        what, verb = "a study", "compare"
    elif isinstance(settings, config.GapConfig):
        what, verb = "a measurement of the gap", "gap"
    return config.ConfigError(f"{path} describes {what}; run it with `gvjax {verb}`")


def _shares(run_dir: pathlib.Path) -> str:
    """Where the time went, as far as it was written down."""
    path = run_dir / "timing.jsonl"
    lines = list(metrics.read(path)) if path.exists() else []
    # The first rounds compile.
    lines = [line for line in lines if "share/train" in line][len(lines) // 4 :]
    if not lines:
        return ""
    whole = sum(line["step_time"] for line in lines)
    spent = {
        part: sum(line[f"share/{part}"] * line["step_time"] for line in lines)
        for part in ("data", "generate", "score", "train")
        if f"share/{part}" in lines[0]
    }
    return ", ".join(f"{part} {spent[part] / whole:.0%}" for part in spent)


def sample(arguments: argparse.Namespace) -> int:
    """Shows completions of a policy."""
    done = single.finished(arguments.run_dir)
    rng = role_rng(arguments.seed, "shown prompts")
    prompts = done.task.prompts(rng, arguments.prompts, "test")
    judged = done.task.reward_range is not None
    table = Table("prompt", "completion", *(["gold"] if judged else []))
    for prompt, completion, gold in single.samples(
        done.ground,
        done.task,
        done.policy(),
        prompts,
        seed=arguments.seed,
        num_samples=arguments.samples,
        temperature=arguments.temperature,
    ):
        table.add_row(prompt, completion, *([f"{gold:.2f}"] if judged else []))
    Console().print(table)
    return 0


def eval(arguments: argparse.Namespace) -> int:
    """Judges a policy or a reward model."""
    done = single.finished(arguments.run_dir)
    table = Table("quantity", "value", "95% interval")
    section = done.settings.settings
    if isinstance(section, config.RewardSection):
        pairs = single.heldout_pairs(done, arguments.prompts, arguments.seed)
        params = done.reward_model().params
        margins = reward.reward_margins(done.ground, section, params, pairs)
        found = evaluate_margins(margins, pairs.chosen_gold - pairs.rejected_gold)
        right = np.where(margins == 0, 0.5, margins > 0)
        log_likelihoods = statistics.pair_log_likelihoods(margins)
        _add_mean(table, "log-likelihood of labels, nats", log_likelihoods)
        _add_share(table, "accuracy on labels", right)
        if found.gold_accuracy is not None:
            table.add_row("accuracy on gold order", f"{found.gold_accuracy:.3f}", "")
        # Each pair in both orders: with labels that are all 1, only one side of ½ would be tested.
        error = statistics.expected_calibration_error(
            special.expit(np.concatenate([margins, -margins])),
            np.repeat([1.0, 0.0], len(margins)),
        )
        table.add_row("expected calibration error", f"{error:.3f}", "")
    else:
        judged, _ = single.judge(done, prompts=arguments.prompts, seed=arguments.seed)
        if judged.gold is not None:
            _add_mean(table, "gold reward", judged.gold)
        _add_mean(table, "KL to the starting policy, nats", judged.kl)
        _add_mean(table, "length, tokens", judged.completions.lengths)
        if isinstance(done.task, Dataset) and done.task.has_pairs:
            pairs = single.heldout_pairs(done, arguments.prompts, arguments.seed)
            margins = implicit_margins(done.ground, done.policy(), pairs)
            found = evaluate_margins(margins, np.ones(len(pairs)), fit_scale=True)
            likelihoods = statistics.pair_log_likelihoods(found.scale * margins)
            _add_mean(table, "log-likelihood of held-out pairs at best β", likelihoods)
            right = np.where(margins == 0, 0.5, margins > 0)
            _add_share(table, "implicit accuracy on held-out pairs", right)
    Console().print(table)
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Writes a run's policy or reward model as a directory of transformers."""
    from gvjax.recipes import export as exporting

    said = exporting.export(
        arguments.run_dir,
        arguments.directory,
        dtype=arguments.dtype,
        pad_token=arguments.pad_token,
    )
    Console().print(said, highlight=False)
    return 0


def import_model(arguments: argparse.Namespace) -> int:
    """Writes weights from elsewhere as a directory of transformers."""
    from gvjax.recipes import export as exporting

    Console().print(exporting.convert(arguments.source, arguments.directory))
    return 0


def data(arguments: argparse.Namespace) -> int:
    """Shows a config's rows, or counts what is odd about them."""
    from gvjax.data import batches, inspect
    from gvjax.recipes import reading

    settings = config.load(arguments.config, arguments.overrides)
    section = settings.task
    if not isinstance(section, config.DatasetSection):
        raise config.ConfigError(
            f"task {section.name} makes its prompts itself; `gvjax data` looks at datasets"
        )
    part = section.demonstrations if arguments.demonstrations else section.rows
    if part is None:
        raise config.ConfigError(
            "--demonstrations is given, but the config names no task.demonstrations; leave it out"
        )
    try:
        encoding = reading.encoding_of(section)
        rows = reading.rows_of(section, part, arguments.split)
        examples = reading.examples_of(rows, part, encoding)
        if arguments.what == "show":
            count = min(arguments.rows, len(examples))
            made = batches.Batches(examples, batch_size=count, seed=arguments.seed)
            inspect.show(made, encoding.tokenizer, rows=rows, count=count)
        else:
            held_out: Split = "test" if arguments.split == "train" else "train"
            other = reading.rows_of(section, section.rows, held_out)
            inspect.stats(rows, examples, other=other)
    except ValueError as error:
        raise config.ConfigError(f"task: {error}") from None
    return 0


def puzzles(arguments: argparse.Namespace) -> int:
    """Writes procedural puzzles as rows."""
    from gvjax.data import puzzles as making

    options = config.options(arguments.overrides)
    sizes = {"train": arguments.train, "test": arguments.test}
    directory = pathlib.Path(arguments.directory)
    try:
        making.write(
            arguments.task, directory, sizes, seed=arguments.seed, options=options
        )
    except ValueError as error:
        raise config.ConfigError(str(error)) from None
    Console().print(f"{arguments.task} written to {directory}", highlight=False)
    return 0


def _add_mean(table: Table, name: str, values) -> None:
    """One row: the mean over prompts, with what the choice of prompts leaves open (one training seed says no more)."""
    # The sum turns a rounded −0 into 0.
    mean = round(float(np.mean(values)), 3) + 0.0
    ends = statistics.seed_mean(values).interval()
    assert ends is not None, "at least two prompts are asked for"
    low, high = ends
    table.add_row(name, f"{mean:.3f}", f"{low:.3f} to {high:.3f}")


def _add_share(table: Table, name: str, hits: np.ndarray) -> None:
    """The same of a share; ties count half."""
    low, high = statistics.wilson_interval(float(hits.sum()), len(hits))
    table.add_row(name, f"{hits.mean():.3f}", f"{low:.3f} to {high:.3f}")

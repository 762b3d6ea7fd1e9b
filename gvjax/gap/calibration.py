"""Proof that the tool is honest: thousands of simulated studies whose truth is known, through its own intervals and rules.

Every check counts studies in which something happened and holds the share, with Wilson's interval, against a rule that was
written down first. What the tool must never do is recommend RL where none of it can pay.
"""

import collections
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.markup import escape
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

from gvjax.gap import simulation, statistics
from gvjax.gap.advice import Margins
from gvjax.gap.simulation import (
    Contenders,
    Design,
    DimensionToy,
    Features,
    Kinds,
    Study,
)
from gvjax.gap.statistics import Estimate
from gvjax.judges import agreement
from gvjax.usage import ExitCode, Parser

FALSE_ALARMS = 0.05
POWER = 0.8
COVERAGE = (0.93, 0.97)
CHUNK = 20
"""Studies that a process does at a time."""

RL, DPO = "RL is likely to pay", "DPO is enough"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Simulated studies of one kind.

    Attributes:
      name: short.
      about: what is true of it.
      simulate: one study; from a random generator to what it came to.
      share: of the studies asked for, how many are done of this one.
    """

    name: str
    about: str
    simulate: Callable[[np.random.Generator], Any]
    share: float = 1.0


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a share of studies must satisfy.

    Attributes:
      kind: `at most` and `at least` hold the end of Wilson's interval that is the harder one; `within` the share itself.
      ends: the limit, or both.
    """

    kind: Literal["at most", "at least", "within"]
    ends: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.kind} {'–'.join(f'{100 * end:g}%' for end in self.ends)}"

    def holds(self, share: float, low: float, high: float) -> bool:
        """Whether a share with its interval satisfies it."""
        if self.kind == "at most":
            return high <= self.ends[0]
        if self.kind == "at least":
            return low >= self.ends[0]
        return self.ends[0] <= share <= self.ends[1]


NEVER = Rule("at most", (FALSE_ALARMS,))
MOSTLY = Rule("at least", (POWER,))
COVERS = Rule("within", COVERAGE)


@dataclasses.dataclass(frozen=True)
class Check:
    """One row of the table, before it is known.

    Attributes:
      experiment: name of the studies it counts.
      text: what is counted.
      happened: whether it happened in a study.
      rule: what the share must satisfy.
    """

    experiment: str
    text: str
    happened: Callable[[Any], bool]
    rule: Rule


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
      experiment, check, rule: what was counted, and what was asked for.
      count, studies: in how many of how many studies it happened.
      share, low, high: with Wilson's 95% interval.
      passed: whether the rule holds.
    """

    experiment: str
    check: str
    rule: str
    count: int
    studies: int
    share: float
    low: float
    high: float
    passed: bool


@dataclasses.dataclass(frozen=True)
class Outcome:
    """All rows, and beside them what the studies said.

    Attributes:
      seed, studies: what was asked for.
      rows: in the order of the table.
      verdicts: experiment -> advice -> how often, `predicted` without a pilot and `observed` with it.
    """

    seed: int
    studies: int
    rows: tuple[Row, ...]
    verdicts: dict[str, dict[str, dict[str, int]]]

    @property
    def passed(self) -> bool:
        """Whether every rule holds."""
        return all(row.passed for row in self.rows)


def says(verdict: str, when: Literal["predicted", "observed"]):
    """Whether a study's advice is this verdict, without a pilot or with it."""

    def happened(study: Study) -> bool:
        return getattr(study, when).verdict == verdict

    return happened


def covers(name: str, value: float):
    """Whether the 95% interval of one of a study's estimates covers a value."""

    def happened(study: Study) -> bool:
        return _covers(study.estimates[name], value)

    return happened


def above(name: str, value: float):
    """Whether the 95% interval of one of a study's estimates lies above a value."""

    def happened(study: Study) -> bool:
        ends = study.estimates[name].interval()
        return ends is not None and ends[0] > value

    return happened


def negligible(study: Study) -> bool:
    """Whether the verifier's advantage is estimated within its margin."""
    return abs(study.estimates["advantage"].mean) < Margins().nats


def _covers(estimate: Estimate, value: float) -> bool:
    ends = estimate.interval()
    return ends is not None and ends[0] <= value <= ends[1]


def _simulated(world: simulation.World, design: Design | None = None):
    return lambda rng: simulation.study(world, design or Design(), rng)


MISLED = Kinds.unmoved(probabilities=(0.003, 0.4985, 0.4985), gold=(3.0, 0.2, 0.0))
"""Great completions are rare and all pairs together do not move the policy towards them, as the reward does."""
TOY = DimensionToy()
EQUAL = Contenders()
LENGTH = 0.6
"""Log-odds by which the biased judge likes a completion more for a typical difference in length."""
ERRORS = 0.15
"""The share of the labels that the erring judge turns round."""


def judged(rng: np.random.Generator, bias: float, comparisons: int = 400) -> bool:
    """Whether a judge of so many comparisons is found to like length more than their labels do.

    Quality and length differ by a normal amount each; labels follow quality and, a little, length.
    """
    quality, length = rng.standard_normal((2, comparisons))
    truth = 1.5 * quality + 0.3 * length
    labels, judge = (
        (rng.random(comparisons) < special.expit(truth + extra * length)).astype(float)
        for extra in (0.0, bias)
    )
    return _likes_length(judge, labels, length)


def erring(rng: np.random.Generator, comparisons: int = 400) -> bool:
    """Whether a judge that errs at random, where labels dislike length, is found to like it."""
    length = rng.standard_normal(comparisons)
    labels = (rng.random(comparisons) < special.expit(-LENGTH * length)).astype(float)
    judge = np.abs(labels - (rng.random(comparisons) < ERRORS))
    return _likes_length(judge, labels, length)


def _likes_length(judge: np.ndarray, labels: np.ndarray, length: np.ndarray) -> bool:
    bias = agreement.length_bias(judge, labels, length)
    return agreement.likes_length(agreement.length_effect(judge, length), bias)


EXPERIMENTS = (
    Experiment(
        "isomorphic",
        "verifier and policy have the same 20 features: true D = 0, A = 0",
        _simulated(Features(paying=20, seen=20, steered=20)),
    ),
    Experiment(
        "dimensions",
        f"27 completions, 3 features, {TOY.num_pairs} pairs: A = {TOY.advantage:.5f} nats",
        TOY.study,
    ),
    Experiment(
        "gap",
        "the verifier has 3 features to learn, the policy 60: RL pays",
        _simulated(Features(paying=3, seen=3, steered=60)),
        0.1,
    ),
    Experiment(
        "short horizon",
        "its twin: the policy too has 3",
        _simulated(Features(paying=3, seen=3, steered=3)),
        0.3,
    ),
    Experiment(
        "complex verifier",
        "its twin: the verifier too has 60",
        _simulated(Features(paying=60, seen=60, steered=60)),
        0.3,
    ),
    Experiment(
        "misspecified policy",
        "one feature moves the policy, pairs not to first order, the reward does: RL gains, A is within its margin",
        _simulated(MISLED, Design(seeds=8, ridges=(1e-5, 1e-4, 1e-3))),
        0.1,
    ),
    Experiment(
        "uncovered policy",
        "40 of the policy's 43 features do not vary in the pairs: A = 0, and RL pays",
        _simulated(Features(paying=3, seen=3, steered=43, uncovered=40), Design(seeds=8)),
        0.1,
    ),
    Experiment(
        "unrealisable reward",
        "the verifier sees 3 of the 20 features that pay, the policy all: DPO wins",
        _simulated(Features(paying=20, seen=3, steered=20, num_pairs=800)),
        0.3,
    ),
    Experiment(
        "shuffled labels",
        "the gap task, with a reward model that learned from coin flips: worth nothing",
        _simulated(Features(paying=3, seen=3, steered=60), Design(shuffled=True)),
    ),
    Experiment(
        "equal arms",
        f"three offline arms are alike, and RL leads each by just what matters: true D = {EQUAL.lead:g}",
        EQUAL.study,
    ),
    Experiment("fair judge", "likes length as much as the labels do", lambda rng: judged(rng, 0.0)),
    Experiment("biased judge", f"likes length more, by {LENGTH} in log-odds", lambda rng: judged(rng, LENGTH)),
    Experiment("erring judge", f"repeats labels that dislike length by {LENGTH} in log-odds, and turns {ERRORS:.0%} of them round", erring),
)  # fmt: skip

CHECKS = (
    Check("isomorphic", f"“{RL}”, with a pilot", says(RL, "observed"), NEVER),
    Check("isomorphic", f"“{RL}”, predicted", says(RL, "predicted"), NEVER),
    Check("isomorphic", "the interval of D covers 0", covers("difference", 0.0), COVERS),
    Check("isomorphic", "the interval of A covers 0", covers("advantage", 0.0), COVERS),
    Check("dimensions", "the interval of A covers the truth", lambda found: _covers(found, TOY.advantage), COVERS),
    Check("gap", f"“{RL}”, with a pilot", says(RL, "observed"), MOSTLY),
    Check("gap", f"“{RL}”, predicted", says(RL, "predicted"), MOSTLY),
    Check("short horizon", f"“{RL}”, with a pilot", says(RL, "observed"), NEVER),
    Check("short horizon", f"“{RL}”, predicted", says(RL, "predicted"), NEVER),
    Check("complex verifier", f"“{RL}”, with a pilot", says(RL, "observed"), NEVER),
    Check("complex verifier", f"“{RL}”, predicted", says(RL, "predicted"), NEVER),
    Check("misspecified policy", "the interval of D lies above 0", above("difference", 0.0), MOSTLY),
    Check("misspecified policy", f"A is estimated within ±{Margins().nats:g} nats", negligible, MOSTLY),
    Check("misspecified policy", f"“{DPO}”, with a pilot", says(DPO, "observed"), NEVER),
    Check("misspecified policy", f"“{DPO}”, predicted", says(DPO, "predicted"), NEVER),
    Check("uncovered policy", f"A is estimated within ±{Margins().nats:g} nats", negligible, MOSTLY),
    Check("uncovered policy", f"“{RL}”, with a pilot", says(RL, "observed"), MOSTLY),
    Check("uncovered policy", f"“{DPO}”, predicted", says(DPO, "predicted"), NEVER),
    Check("unrealisable reward", f"“{RL}”, with a pilot", says(RL, "observed"), NEVER),
    Check("unrealisable reward", f"“{RL}”, predicted", says(RL, "predicted"), NEVER),
    Check("unrealisable reward", f"“{DPO}”, with a pilot", says(DPO, "observed"), MOSTLY),
    Check("shuffled labels", "the interval of its gain by best-of-n covers 0", covers("largest", 0.0), COVERS),
    Check("shuffled labels", "the interval of its gold gap covers 0", covers("gold_gap", 0.0), COVERS),
    Check("shuffled labels", f"“{RL}”, with a pilot", says(RL, "observed"), NEVER),
    Check("shuffled labels", f"“{RL}”, predicted", says(RL, "predicted"), NEVER),
    Check("shuffled labels", "“improve coverage first”, predicted, though a perfect judge gains much", says("improve coverage first", "predicted"), NEVER),
    Check("equal arms", f"“{DPO}”, with a pilot", says(DPO, "observed"), NEVER),
    Check("equal arms", "the interval of D covers the truth", covers("difference", EQUAL.lead), COVERS),
    Check("fair judge", "the length warning fires", bool, NEVER),
    Check("biased judge", "the length warning fires", bool, MOSTLY),
    Check("erring judge", "the length warning fires", bool, NEVER),
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Runs `gvjax gap --calibrate`.

    Args:
      argv: the further arguments.

    Returns:
      Exit code: 0 where every rule holds, 1 where one does not, 64 where the request itself is wrong.
    """
    parser = Parser(
        prog="gvjax gap --calibrate",
        description="Simulate studies whose truth is known and check that intervals cover it and advice respects it.",
    )
    parser.add_argument(
        "--studies",
        type=int,
        default=1000,
        help="simulated studies of each kind where a rate near 5%% is at stake, fewer elsewhere (default 1000)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of all random numbers (default 0)"
    )
    parser.add_argument(
        "--out",
        metavar="DIRECTORY",
        type=pathlib.Path,
        help="write calibration.md and calibration.json there",
    )
    options = parser.parse_args(argv)
    if options.studies < 10 or options.seed < 0:
        print(
            f"gvjax gap --calibrate: --studies is {options.studies} and --seed {options.seed}; use at least 10 studies and"
            " a seed of 0 or more",
            file=sys.stderr,
        )
        return ExitCode.USER_ERROR
    console = Console(width=None if sys.stdout.isatty() else 160)
    return calibrate(
        console, studies=options.studies, seed=options.seed, directory=options.out
    )


def calibrate(
    console: Console,
    *,
    studies: int = 1000,
    seed: int = 0,
    directory: pathlib.Path | None = None,
) -> int:
    """`gvjax gap --calibrate`: simulates, prints the table, and says by its exit code whether every rule holds.

    Args:
      console: for progress and the table.
      studies: simulated studies of each kind where a rate near 5% is at stake; fewer elsewhere.
      seed: of all random numbers.
      directory: where `calibration.json` and `calibration.md` are written; None writes neither.

    Returns:
      0, or 1 where a rule does not hold.
    """
    outcome = simulate(studies, seed, console=console)
    console.print(table(outcome))
    failed = [f"{row.experiment}: {row.check}" for row in outcome.rows if not row.passed]  # fmt: skip
    passed = len(outcome.rows) - len(failed)
    console.print(f"{passed} of {len(outcome.rows)} rules hold", highlight=False)
    for line in failed:
        console.print(f"fails: {line}", highlight=False)
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(outcome), indent=1, ensure_ascii=False)
        (directory / "calibration.json").write_text(text + "\n", encoding="utf-8")
        (directory / "calibration.md").write_text(markdown(outcome), encoding="utf-8")
    return 0 if outcome.passed else 1


def simulate(
    studies: int, seed: int, *, console: Console, workers: int | None = None
) -> Outcome:
    """All experiments and the checks on them; the same for any number of processes.

    Args:
      studies: of an experiment of share 1.
      seed: each study has random numbers of its own, by seed, experiment and place.
      console: for progress.
      workers: processes; None takes one a core.
    """
    work = [
        (number, start, min(start + CHUNK, count))
        for number, experiment in enumerate(EXPERIMENTS)
        for count in [round(studies * experiment.share)]
        for start in range(0, count, CHUNK)
    ]
    found: dict[str, list[tuple[dict[int, list[bool]], Verdicts]]] = (
        collections.defaultdict(list)
    )
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar, _processes(workers) as pool:
        row = bar.add_task("studies", total=sum(end - start for _, start, end in work))
        # In order, whoever was first.
        for (number, start, end), each in zip(
            work, pool.map(_some, *zip(*[(seed, *item) for item in work]))
        ):
            found[EXPERIMENTS[number].name].append(each)
            bar.update(row, advance=end - start, description=EXPERIMENTS[number].name)
    results = {name: _joined(chunks) for name, chunks in found.items()}
    rows = []
    for number, check in enumerate(CHECKS):
        happened = results[check.experiment][0][number]
        count, total = sum(happened), len(happened)
        low, high = statistics.wilson_interval(count, total)
        share = count / total
        passed = check.rule.holds(share, low, high)
        rows.append(
            Row(check.experiment, check.text, str(check.rule), count, total, share, low, high, passed)
        )  # fmt: skip
    verdicts = {name: found[1] for name, found in results.items() if found[1]}
    return Outcome(seed, studies, tuple(rows), verdicts)


def table(outcome: Outcome) -> Table:
    """The rows for a terminal."""
    made = Table("studies of", "what is counted", "rule", "observed", "of", "holds")
    for row in outcome.rows:
        made.add_row(
            row.experiment,
            escape(row.check),
            row.rule,
            escape(_observed(row)),
            str(row.studies),
            "yes" if row.passed else "[bold red]NO[/]",
        )
    return made


def markdown(outcome: Outcome) -> str:
    """The rows, what each experiment is, and what its studies were advised."""
    lines = [
        "# Is the tool honest?",
        "",
        f"`gvjax gap --calibrate --studies {outcome.studies} --seed {outcome.seed} --out configs/results` simulates studies whose truth is"
        " known, each with five seeds or eight, and puts them through the quantities, intervals and rules of `gvjax gap`. Shares"
        " have Wilson's 95% intervals; “at most” and “at least” are asked of the interval's end, “within” of the share.",
        "",
        "| studies of | what is counted | rule | observed | of | holds |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.experiment} | {row.check} | {row.rule} | {_observed(row)} | {row.studies} | {'yes' if row.passed else '**no**'} |"
        for row in outcome.rows
    ]
    lines += ["", "| studies of | what is true | advice without a pilot | with one |", "|---|---|---|---|"]  # fmt: skip
    for experiment in EXPERIMENTS:
        said = outcome.verdicts.get(experiment.name, {})
        columns = [_shares(said.get(when, {})) for when in ("predicted", "observed")]
        lines.append(f"| {experiment.name} | {experiment.about} | {' | '.join(columns)} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def _observed(row: Row) -> str:
    return f"{100 * row.share:.1f}% [{100 * row.low:.1f}, {100 * row.high:.1f}]"


def _shares(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {100 * count / total:.0f}%" for name, count in ordered)


def _processes(workers: int | None) -> concurrent.futures.Executor:
    if workers is None:
        affinity = getattr(os, "sched_getaffinity", None)
        workers = len(affinity(0)) if affinity else os.cpu_count() or 1
    # Small matrices: threads of linear algebra would only stand in each other's way. Read when a process imports numpy.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    return concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn")
    )


Verdicts = dict[str, dict[str, int]]


def _some(
    seed: int, number: int, start: int, end: int
) -> tuple[dict[int, list[bool]], Verdicts]:
    """What happened in some studies of one experiment: for each check on it, in each study; and their advice."""
    experiment = EXPERIMENTS[number]
    checks = {
        place: check
        for place, check in enumerate(CHECKS)
        if check.experiment == experiment.name
    }
    happened: dict[int, list[bool]] = {place: [] for place in checks}
    verdicts: Verdicts = {}
    for place in range(start, end):
        rng = np.random.default_rng([seed, zlib.crc32(experiment.name.encode()), place])
        found = experiment.simulate(rng)
        for each, check in checks.items():
            happened[each].append(bool(check.happened(found)))
        if isinstance(found, Study):
            for when in ("predicted", "observed"):
                counts = verdicts.setdefault(when, {})
                verdict = getattr(found, when).verdict
                counts[verdict] = counts.get(verdict, 0) + 1
    return happened, verdicts


def _joined(
    chunks: Sequence[tuple[dict[int, list[bool]], Verdicts]],
) -> tuple[dict[int, list[bool]], Verdicts]:
    happened: dict[int, list[bool]] = collections.defaultdict(list)
    verdicts: Verdicts = {}
    for each, said in chunks:
        for place, values in each.items():
            happened[place] += values
        for when, counts in said.items():
            total = verdicts.setdefault(when, {})
            for verdict, count in counts.items():
                total[verdict] = total.get(verdict, 0) + count
    return happened, verdicts

"""The command line: `gvjax gap`, `compare`, `run`, `sample`, `eval`, `export`, `import`, `data`, `puzzles`, `plan`, `verify`, `bench`."""

import argparse
import gc
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from gvjax.usage import ExitCode, Parser

_FUNCTIONS = {"import": "import_model"}
"""Functions of `commands` that cannot be called as their verb."""


_DESCRIPTION = """\
gvjax takes one preference dataset down both roads of fine-tuning and says, with error bars, which road pays.

  gvjax gap configs/gap/quickstart.yaml      is checking easier than doing on this task? which road to take
  gvjax gap --calibrate                      is that advice honest? a thousand studies whose truth is known
  gvjax compare configs/quickstart.yaml      both roads on one task, several seeds, one report
  gvjax run configs/tour/sft.yaml seed=3     one recipe
  gvjax plan CONFIG --on v5e-256             what fits on a machine that you do not have
  gvjax verify                               prove the losses and the theory on this machine
  gvjax bench                                how fast this machine runs every part, and how fast it could
"""

_OVERRIDES = """\
Overrides change single fields: dotted keys, values as in YAML.

  gvjax {verb} CONFIG {changes}
"""


_SAMPLE_EXAMPLE = """\
  gvjax sample runs/tour/sft                 one completion of five prompts
  gvjax sample runs/tour/rloo -n 3 -k 4      four of three, to see how alike they are
  gvjax sample runs/tour/rloo -t 0           the likeliest ones
"""

_SEED_HELP = "of the draws; the test rows of a dataset are the same for every seed"

_EVAL_EXAMPLE = """\
  gvjax eval runs/tour/rloo --prompts 2000   narrower intervals
  gvjax eval runs/tour/reward                how well it predicts labels
"""


_EXPORT_EXAMPLE = """\
  gvjax export runs/smollm2/dpo exported/dpo                  AutoModelForCausalLM.from_pretrained loads it
  gvjax export runs/smollm2/reward exported/reward            AutoModelForSequenceClassification loads it
"""

_IMPORT_EXAMPLE = """\
  gvjax import SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2     needs the gguf extra
  gvjax import HuggingFaceTB/SmolLM2-135M models/smollm2-base     needs a network
"""

_DATA_EXAMPLE = """\
  gvjax data show configs/smollm2/dpo.yaml        what a step would see: prompt, completion, EOS in colours
  gvjax data stats configs/smollm2/dpo.yaml       lengths, truncation, duplicates, ties, leaked prompts
  gvjax data stats CONFIG task.max_prompt=512     with another length
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    As one of several processes it does not return after an error: it ends the process.

    Returns:
      Exit code: 0 done; 1 a check failed, 3 a plan does not fit; 64 the config or the command line is wrong, 70 a crash (71
      where steps stopped coming), 85 stopped before its end, to be started again; 130 Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # As Python does for a script: losses, tasks and verifiers that lie here can be named in a config.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    from gvjax import runtime

    # Bench times the compiling too.
    runtime.configure(keep_programs=arguments[:1] != ["bench"])
    if arguments[:1] == ["verify"]:
        # It has its own parser, with the checks in its help.
        from gvjax import verify

        return verify.main(arguments[1:])
    if arguments[:1] == ["gap"] and "--calibrate" in arguments:
        # No config: the studies are simulated.
        from gvjax.gap import calibration

        return calibration.main([a for a in arguments[1:] if a != "--calibrate"])
    if arguments[:1] == ["bench"]:
        # The same, with the rows in its help.
        from gvjax import bench

        return bench.main(arguments[1:])
    if arguments[:1] == ["plan"]:
        # It takes options between overrides, which parsers of several verbs cannot.
        from gvjax.plan import command

        return command.main(arguments[1:])
    parsed = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO if parsed.verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    from gvjax import checkpoint, commands, distributed

    if not parsed.verbose:
        checkpoint.say_failures_once()
    # What was imported stays: no later collection need look at it.
    gc.freeze()
    code = _done(commands, parsed)
    if distributed.joined() and code not in (ExitCode.DONE, ExitCode.PREEMPTED):
        # At once: the others may be waiting for this process in a collective.
        distributed.exit_with(code)
    return code


def _done(commands, parsed: argparse.Namespace) -> int:
    """The exit code of a command, errors said on stderr."""
    try:
        return getattr(commands, _FUNCTIONS.get(parsed.verb, parsed.verb))(parsed)
    except commands.REFUSED as error:
        print(f"gvjax {parsed.verb}: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR
    except commands.EXPECTED as error:
        print(f"gvjax {parsed.verb}: {error}", file=sys.stderr)
        return ExitCode.CRASH
    except Exception:
        traceback.print_exc()
        return ExitCode.CRASH
    except KeyboardInterrupt:
        print(
            "\nstopped; the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        return ExitCode.INTERRUPTED


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return number


_seed, _count, _prompts = _at_least(0), _at_least(1), _at_least(2)


def _temperature(text: str) -> float:
    if not 0 <= (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="gvjax", description=_DESCRIPTION, formatter_class=raw)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    def verb(name: str, summary: str, what: str, more: str = ""):
        made = verbs.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.\n\n{what}",
            epilog=more,
            formatter_class=raw,
        )
        made.add_argument("-v", "--verbose", action="store_true", help="log more")
        return made

    def overrides(made, name: str, changes: str):
        made.add_argument("config", metavar="CONFIG", help="a YAML file")
        made.add_argument(
            "overrides",
            nargs="*",
            default=[],
            metavar="key=value",
            help="changes to it",
        )
        made.epilog = _OVERRIDES.format(verb=name, changes=changes)

    compare = verb(
        "compare",
        "take one task down both roads and report which pays",
        "Trains every arm of the study for every seed, from the same SFT policy and the same pairs, and writes\n"
        "results.json and report.html to its run_dir. An interrupted study goes on where it was with the same\n"
        "command; an edited one re-uses every stage that the edit does not touch. After SIGTERM it leaves with\n"
        "code 85. Started as several processes (see `gvjax run --help`) they do every stage together.",
    )
    overrides(compare, "compare", "seeds=[1,2] sft.steps=100")
    gap = verb(
        "gap",
        "measure the generation-verification gap of a task and advise",
        "First tier, without RL: trains reward models, a DPO policy and null scorers on the same pairs with the same tuning\n"
        "budget, holds their likelihoods, data needs and best-of-n choices against each other. Second tier, where the config\n"
        "has a `pilot`: takes both roads. Writes gap.json and gap.html to run_dir, verdict first, never more strongly than\n"
        "the intervals allow. Resumes, re-uses stages and takes several processes as `compare` does; where people are the\n"
        "judge it leaves with code 85 until their sheets are filled in.",
    )
    overrides(gap, "gap", "seeds=[1,2] margins.winrate=0.05")
    gap.add_argument(
        "--calibrate",
        action="store_true",
        help="without a CONFIG: simulate studies whose truth is known, and check that the advice is honest",
    )
    run = verb(
        "run",
        "run one recipe",
        "Recipes: sft, reward, dpo, hypo, online_dpo, policy_gradient, ppo, rebel, rejection, best_of_n.\n"
        "Checkpoints, metrics.jsonl and TensorBoard files go to run_dir; the same command resumes. After SIGTERM it\n"
        "checkpoints and leaves with code 85. With GVJAX_COORDINATOR, GVJAX_NUM_PROCESSES and GVJAX_PROCESS_ID set (or\n"
        "under SkyPilot, Slurm, MPI, Cloud TPU) several processes train one model.",
    )
    overrides(run, "run", "seed=3 settings.optimizer.learning_rate=1e-4")
    run.add_argument(
        "--force",
        action="append",
        default=[],
        metavar="FIELD",
        help="go on though this field differs from the run's, e.g. settings.optimizer.learning_rate; may be repeated",
    )
    sample = verb(
        "sample",
        "show completions of a policy that `run` made",
        "Draws completions of test prompts and prints them with their gold rewards.",
        _SAMPLE_EXAMPLE,
    )
    sample.add_argument("run_dir", metavar="RUN_DIR", help="of a finished run")
    sample.add_argument(
        "-n", "--prompts", type=_count, default=5, help="how many prompts"
    )
    sample.add_argument(
        "-k", "--samples", type=_count, default=1, help="completions of each"
    )
    sample.add_argument(
        "-t",
        "--temperature",
        type=_temperature,
        default=1.0,
        help="0 takes the likeliest",
    )
    sample.add_argument("--seed", type=_seed, default=0, help=_SEED_HELP)
    evaluate = verb(
        "eval",
        "judge a policy or reward model that `run` made",
        "Policies: gold reward, KL to the starting policy and length on test prompts, with intervals. Reward models:\n"
        "likelihood, accuracy and calibration on held-out pairs.",
        _EVAL_EXAMPLE,
    )
    evaluate.add_argument("run_dir", metavar="RUN_DIR", help="of a finished run")
    evaluate.add_argument(
        "--prompts", type=_prompts, default=600, help="how many prompts"
    )
    evaluate.add_argument("--seed", type=_seed, default=0, help=_SEED_HELP)
    export = verb(
        "export",
        "write what `run` made as a directory of transformers",
        "A policy becomes a CausalLM, adapters merged; a reward model (pooling: last) a ForSequenceClassification of one\n"
        "label. The tokenizer comes along. vLLM loads it too.",
        _EXPORT_EXAMPLE,
    )
    export.add_argument("run_dir", metavar="RUN_DIR", help="of a finished run")
    export.add_argument("directory", metavar="OUT", help="must hold no weights")
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the tensors",
    )
    export.add_argument("--pad-token", help="of a reward model; never an EOS")
    imported = verb(
        "import",
        "write a .gguf file or a model of the hub as a directory of transformers",
        "The directory serves as model.checkpoint in configs; a .gguf file or an id does too, at the cost of reading it\n"
        "anew in every run.",
        _IMPORT_EXAMPLE,
    )
    imported.add_argument("source", metavar="SOURCE", help="a .gguf file or owner/name")
    imported.add_argument("directory", metavar="OUT", help="must hold no weights")
    data = verb(
        "data",
        "show the rows of a config's dataset, or count what is odd about them",
        "Reads the dataset as a run would: same tokenizer, template, lengths and dropped rows.",
        _DATA_EXAMPLE,
    )
    data.add_argument("what", choices=("show", "stats"))
    data.add_argument("config", metavar="CONFIG", help="a YAML file")
    data.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="changes to it",
    )
    data.add_argument(
        "--split", choices=("train", "validation", "test"), default="train"
    )
    data.add_argument(
        "--demonstrations",
        action="store_true",
        help="of task.demonstrations instead of task.rows",
    )
    data.add_argument(
        "-n", "--rows", type=_count, default=4, help="how many rows to show"
    )
    data.add_argument("--seed", type=_seed, default=0, help="of the rows shown")
    puzzles = verb(
        "puzzles",
        "write puzzles of reasoning-gym as rows, with verifiers of our own",
        "Tasks where an answer is harder to find than to check (countdown, word_ladder, graph_color,\n"
        "palindrome_generation, prime_factorization, kakurasu, mini_sudoku), and controls (chain_sum, gcd,\n"
        "letter_counting, spell_backward). In a config: source: jsonl, gold: puzzle. Needs the extra `puzzles`.",
        "  gvjax puzzles countdown data/countdown min_numbers=3 max_numbers=3\n",
    )
    puzzles.add_argument("task", metavar="TASK")
    puzzles.add_argument("directory", metavar="OUT", help="for train and test.jsonl")
    puzzles.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="options of the task",
    )
    puzzles.add_argument("--train", type=_count, default=1000, help="rows")
    puzzles.add_argument("--test", type=_count, default=200, help="rows")
    puzzles.add_argument("--seed", type=_seed, default=0, help="of the items")
    verbs.add_parser(
        "plan",
        help="compile a run or study for a machine that is not there, and say what fits",
        add_help=False,
    )
    verbs.add_parser(
        "verify",
        help="prove the losses and the theory on this machine",
        add_help=False,
    )
    verbs.add_parser(
        "bench", help="time every part of the library on this machine", add_help=False
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Plan: what a backend wants done, as data. Printing one and running one read the same object."""

import dataclasses
import shlex
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class File:
    """A file written into the job's directory before any command runs."""

    path: str
    text: str


@dataclasses.dataclass(frozen=True)
class Saved:
    """An argument known only when an earlier command has run: what it saved in `path`."""

    path: str


@dataclasses.dataclass(frozen=True)
class Command:
    """One program, started without a shell in the job's directory.

    Attributes:
      argv: the program and its arguments.
      why: what it is for, in a few words.
      save: the file its output goes to, for a later `Saved`; None leaves it on the terminal.
      tries: how often to try, 15 s apart, before giving up.
      may_fail: go on when it fails (deleting what may be gone already).
    """

    argv: tuple[str | Saved, ...]
    why: str
    save: str | None = None
    tries: int = 1
    may_fail: bool = False


@dataclasses.dataclass(frozen=True)
class Wait:
    """Run `command` every `every` seconds until it prints `until`; what is in `never` is an error."""

    command: Command
    until: str
    never: tuple[str, ...]
    every: int = 30


@dataclasses.dataclass(frozen=True)
class Group:
    """Processes that live and die together on this machine.

    Attributes:
      argv: the program each of them runs.
      environments: one mapping per process, laid over the launcher's environment; "{port}" in a value becomes a free
        port, a new one at each start.
      secrets: names of environment variables that must be set when the group starts.
      workdir: where they run; empty for the current directory.
      retries: counted restarts allowed.
      grace: seconds between SIGTERM and SIGKILL.
    """

    argv: tuple[str, ...]
    environments: tuple[Mapping[str, str], ...]
    secrets: tuple[str, ...]
    workdir: str
    retries: int
    grace: int


@dataclasses.dataclass(frozen=True)
class Supervisor:
    """Ask the supervisor of a local job for its `status`, or to `stop`."""

    action: str


Step = Command | Wait | Group | Supervisor


@dataclasses.dataclass(frozen=True)
class Watch:
    """How to follow a job whose machines may be taken away.

    Attributes:
      state: prints the machines' state.
      lost: what `state` or `ended` prints when they are gone and `recover` is due.
      ended: prints the job's exit code once it has ended, and fails before that.
      recover: gets new machines and starts the job on them.
      release: gives the machines back when the job has ended.
    """

    state: Command
    lost: tuple[str, ...]
    ended: Command
    recover: tuple[Step, ...]
    release: tuple[Step, ...]
    every: int = 60


@dataclasses.dataclass(frozen=True)
class Plan:
    """Files to write, then steps in order; `watch` is there where a job can be followed.

    Attributes:
      title: one line that says what this is.
      secrets: names of environment variables whose values must be at hand here, now.
      notes: what must be there already, a line each.
    """

    title: str
    steps: tuple[Step, ...]
    files: tuple[File, ...] = ()
    secrets: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    watch: Watch | None = None


def shell(argv: tuple[str | Saved, ...]) -> str:
    """`argv` as one would type it."""
    return " ".join(
        f'"$(cat {shlex.quote(word.path)})"'
        if isinstance(word, Saved)
        else shlex.quote(word)
        for word in argv
    )


def redact(text: str, secrets: tuple[str, ...], environ: Mapping[str, str]) -> str:
    """`text` with the values of the named secrets replaced by their names."""
    for name in secrets:
        if value := environ.get(name):
            text = text.replace(value, f"<{name}>")
    return text


def show(plan: Plan) -> str:
    """The plan as text: exactly what would be written and run, in order."""
    lines = [f"# {plan.title}"]
    if plan.secrets:
        lines.append(f"# secrets, taken by name from here: {', '.join(plan.secrets)}")
    lines += [f"# {note}" for note in plan.notes]
    for file in plan.files:
        lines += ["", f"# ---- file {file.path}", file.text.rstrip("\n")]
        lines.append(f"# ---- end of {file.path}")
    lines += _show_steps(plan.steps)
    if watch := plan.watch:
        lines += [
            "",
            f"# with --watch, every {watch.every} s:",
            shell(watch.state.argv),
        ]
        lines.append(f"# on {' or '.join(watch.lost)}:")
        lines += [f"    {line}" for line in _show_steps(watch.recover)]
        lines += ["", "# has the job ended?", shell(watch.ended.argv)]
        lines.append("# and once it has:")
        lines += [f"    {line}" for line in _show_steps(watch.release)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _show_steps(steps: tuple[Step, ...]) -> list[str]:
    lines = []
    for number, step in enumerate(steps, start=1):
        lines.append("")
        match step:
            case Command():
                notes = []
                if step.tries > 1:
                    notes.append(f"up to {step.tries} tries")
                if step.may_fail:
                    notes.append("may fail")
                note = f" ({', '.join(notes)})" if notes else ""
                lines.append(f"# {number}. {step.why}{note}")
                redirect = f" > {step.save}" if step.save else ""
                lines.append(shell(step.argv) + redirect)
            case Wait():
                lines.append(
                    f"# {number}. {step.command.why}: every {step.every} s until it prints {step.until}, giving up on "
                    f"{', '.join(step.never)}"
                )
                lines.append(shell(step.command.argv))
            case Group():
                lines.append(
                    f"# {number}. start {len(step.environments)} processes here; restarts: {step.retries} after "
                    f"failures, any number after a checkpointed preemption; {step.grace} s from SIGTERM to SIGKILL"
                )
                lines.append("# {port} is a free one, chosen at each start")
                if step.workdir:
                    lines.append(f"cd {shlex.quote(step.workdir)}")
                for environment in step.environments:
                    pairs = [f"{k}={shlex.quote(v)}" for k, v in environment.items()]
                    lines.append(" ".join([*pairs, shell(step.argv)]))
            case Supervisor(action="stop"):
                lines.append(f"# {number}. stop it, if its supervisor is alive")
                lines.append('kill -TERM "$(cat supervisor.pid)"')
            case Supervisor():
                lines.append(
                    f"# {number}. is the supervisor alive, and if not, how did it end?"
                )
                lines.append("cat supervisor.pid exit_code")
    return lines

"""By how many processes stages are done, and how far they are, for whoever waits."""

import hashlib
import os
from collections.abc import Mapping

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gvjax import config, distributed, sharding
from gvjax.gap.stages import (
    Perform,
    Stage,
    Store,
    run_stages,
)
from gvjax.recipes import checks


def do_all(
    settings: config.StudyConfig | config.GapConfig,
    stages: tuple[Stage, ...],
    store: Store,
    perform: Perform,
    console: Console,
) -> None:
    """Does what is not done yet, with a progress bar, and keeps the config beside it.

    Raises:
      ConfigError: `workers` does not fit the devices, or several processes read other rows or run other code.
      StageError, PreemptedError: see `run_stages`.
    """
    workers = workers_of(settings)
    keys = hashlib.sha256("".join(stage.key for stage in stages).encode()).hexdigest()
    with config.refusing():
        distributed.assert_same_on_all_hosts("plan (data, code)", keys)
    if jax.process_index() == 0:
        frozen = store.root.parent / f"config-{config.config_hash(settings)}.json"
        frozen.write_text(settings.model_dump_json(indent=1) + "\n", encoding="utf-8")
    with Watch(console, stages, workers * jax.process_count()) as watch:
        run_stages(
            stages,
            store,
            perform,
            workers=workers,
            watch=watch,
            together=settings.seeds_together,
        )


ASKED_ONCE = ("llm", "human")
"""Judges behind an endpoint or a sheet: asked by every process, they would be paid for as often."""


def check_together(
    settings: config.StudyConfig | config.GapConfig, processes: int
) -> None:
    """Refuses what several processes cannot do together; they need not have met.

    Args:
      settings: the study or measurement.
      processes: how many were started.

    Raises:
      ConfigError: `workers` asks for more of them, `seeds_together` for something else, or the judge is one to be asked
        once.
    """
    if processes == 1:
        return
    if settings.seeds_together > 1:
        raise config.ConfigError(
            f"seeds_together is {settings.seeds_together}, but {processes} processes were started, which do every stage"
            " together; leave it out, or start one process"
        )
    if settings.workers > 1:
        raise config.ConfigError(
            f"workers is {settings.workers}, but {processes} processes were started, which do every stage together and"
            " start no others; leave workers out, or start one process"
        )
    if isinstance(settings, config.GapConfig) and settings.judge.kind in ASKED_ONCE:
        raise config.ConfigError(
            f"judge.kind is {settings.judge.kind}, which one process asks, and {processes} were started; take gold or"
            " reward_model, which all of them compute, or start one process"
        )


def _check_seeds_together(
    settings: config.StudyConfig | config.GapConfig,
) -> None:
    if settings.seeds_together == 1:
        return
    mesh = settings.mesh
    with config.refusing("mesh"):
        size = sharding.make_mesh(data=mesh.data, fsdp=mesh.fsdp, tensor=mesh.tensor).size  # fmt: skip
    checks.check_seeds_together(settings, size)


def workers_of(settings: config.StudyConfig | config.GapConfig) -> int:
    """Processes that do stages for this one: one a core on a CPU; on accelerators, whose memory cannot be shared out, and
    where several processes were started, 1: each does them itself.

    Raises:
      ConfigError: `workers` or `seeds_together` does not fit the devices, or see `check_together`.
    """
    check_together(settings, jax.process_count())
    _check_seeds_together(settings)
    if jax.process_count() > 1:
        return 1
    if jax.default_backend() != "cpu":
        if settings.workers > 1:
            raise config.ConfigError(
                f"workers is {settings.workers}, but processes cannot share {jax.devices()[0].device_kind}; use 1"
            )
        return 1
    if settings.workers:
        return settings.workers
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Watch:
    """The progress bar on a terminal; elsewhere a line for every stage."""

    def __init__(self, console: Console, stages: tuple[Stage, ...], workers: int):
        self._console = console
        self._workers = workers
        self._shares = dict.fromkeys((stage.key for stage in stages), 0.0)
        self._costs = {stage.key: stage.cost for stage in stages}
        self._kept = 0
        self._finished = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "Watch":
        self._bar.start()
        processes = "process" if self._workers == 1 else "processes"
        self._console.print(f"{len(self._shares)} stages, {self._workers} {processes}")
        self._task = self._bar.add_task("starting", total=sum(self._costs.values()))
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()
        if self._kept:
            self._console.print(
                f"{self._kept} of {len(self._shares)} stages were done before and were kept"
            )

    def __call__(
        self, stage: Stage, what: str, share: float, shown: Mapping[str, float]
    ) -> None:
        self._shares[stage.key] = share
        if what == "kept":
            self._kept += 1
        numbers = "  ".join(f"{name} {value:.3g}" for name, value in shown.items())
        done = sum(share * self._costs[key] for key, share in self._shares.items())
        self._bar.update(
            self._task, completed=done, description=f"{stage.label}  {numbers}"[:70]
        )
        if what == "done":
            self._finished += 1
            if not self._console.is_terminal:
                total = sum(self._costs.values())
                self._console.print(
                    f"{done / total:4.0%}  {stage.label}", highlight=False
                )

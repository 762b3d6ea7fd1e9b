"""`gvjax gap`: measures the generation–verification gap of a task, and says which road is likely to pay."""

import functools
import pathlib

import jax
from rich.console import Console

from gvjax import config
from gvjax.gap import gap_report, judging, measurement, progress, weighing
from gvjax.gap.findings import GapFindings
from gvjax.gap.stages import Store, code_fingerprint, share_compiled_programs


def measure(settings: config.GapConfig, console: Console) -> GapFindings:
    """Runs a measurement to its end, or goes on with one.

    Writes `gap.json` (every seed's value) and `gap.html` to the run directory. Several processes call it together; the
    first alone writes, and `console` is to be quiet on the others.

    Args:
      settings: the measurement.
      console: where progress and the table are shown.

    Raises:
      ConfigError: it cannot be run as configured.
      StageError: a stage failed; the others stay done.
      PreemptedError: SIGTERM came; the same command goes on.
      BusyError: another process works in the run directory.
      LabelsWanted: people are the judge, and their sheets are not filled in yet.
      JudgeError: the judge's endpoint failed, or its budget is spent.
    """
    measurement.check(settings)
    judging.check(settings)
    progress.workers_of(settings)
    directory = pathlib.Path(settings.run_dir)
    store = Store(directory / "stages")
    with store.held():
        if jax.process_index() == 0:
            store.started()
        share_compiled_programs(store)
        plan = measurement.plan_of(settings, code_fingerprint())
        perform = functools.partial(measurement.perform, settings, plan)
        progress.do_all(settings, plan.stages, store, perform, console)
        findings = weighing.weigh(settings, plan, store)
        if jax.process_index() == 0:
            findings.save(directory / "gap.json")
            gap_report.render(findings, directory / "gap.html")
    console.print(gap_report.terminal_table(findings))
    console.print(f"report:  {directory / 'gap.html'}")
    console.print(f"numbers: {directory / 'gap.json'}")
    return findings

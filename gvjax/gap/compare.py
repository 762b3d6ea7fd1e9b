"""`gvjax compare`: does what a study lacks, shows how far it is, and writes the report."""

import functools
import pathlib

import jax
from rich.console import Console

from gvjax import config
from gvjax.gap import gathering, performing, planning, progress, report
from gvjax.gap.results import StudyResults
from gvjax.gap.stages import Store, code_fingerprint, share_compiled_programs


def compare(settings: config.StudyConfig, console: Console) -> StudyResults:
    """Runs a study to its end, or goes on with one.

    Writes `results.json` (every seed's value) and `report.html` to the run directory. Several processes call it together;
    the first alone writes, and `console` is to be quiet on the others.

    Args:
      settings: the study.
      console: where progress and the table are shown.

    Raises:
      ConfigError: the study cannot be run as configured.
      StageError: a stage failed; the others stay done.
      PreemptedError: SIGTERM came; the same command goes on.
      BusyError: another process works in the run directory.
    """
    planning.check(settings)
    progress.workers_of(settings)
    directory = pathlib.Path(settings.run_dir)
    store = Store(directory / "stages")
    with store.held():
        if jax.process_index() == 0:
            store.started()
        share_compiled_programs(store)
        plan = planning.plan_of(settings, code_fingerprint())
        perform = functools.partial(performing.perform, settings, plan)
        progress.do_all(settings, plan.stages, store, perform, console)
        results = gathering.gather(settings, plan, store)
        if jax.process_index() == 0:
            results.save(directory / "results.json")
            report.render(results, directory / "report.html")
    console.print(report.terminal_table(results))
    console.print(f"report:  {directory / 'report.html'}")
    console.print(f"numbers: {directory / 'results.json'}")
    return results

"""Where numbers go while a run goes on: a JSONL file always, TensorBoard by default, Weights & Biases on request.

The JSONL file holds only what the computation determines, so that two runs of the same config, or a resumed and an
unbroken one, have the same lines; clock times go to a file of their own.
"""

import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np


class MetricsLog:
    """Appends one line of metrics per step to a run directory.

    Attributes:
      path: the JSONL file, `metrics.jsonl`.
    """

    def __init__(
        self,
        directory: pathlib.Path | str,
        *,
        tensorboard: bool = True,
        wandb_project: str | None = None,
    ):
        """Opens the log of a run.

        Args:
          directory: the run directory; made if missing.
          tensorboard: write event files beside the JSONL.
          wandb_project: also log to this Weights & Biases project (the `wandb` extra); its key is read from the
            environment by that library.

        Raises:
          ImportError: wandb_project is given and the extra is not installed.
        """
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "metrics.jsonl"
        self._timing_path = directory / "timing.jsonl"
        self._lines = self.path.open("a", encoding="utf-8")
        self._timing = self._timing_path.open("a", encoding="utf-8")
        self._tensorboard = None
        if tensorboard:
            import tensorboardX

            self._tensorboard = tensorboardX.SummaryWriter(
                str(directory / "tensorboard")
            )
        self._wandb = None
        if wandb_project is not None:
            try:
                import wandb
            except ImportError as error:
                raise ImportError(
                    "logging to Weights & Biases needs the wandb extra: pip install 'gvjax[wandb]'"
                ) from error
            self._wandb = wandb.init(
                project=wandb_project, dir=str(directory), name=directory.name
            )

    def write(
        self,
        step: int,
        metrics: Mapping[str, Any],
        timing: Mapping[str, float] | None = None,
    ) -> None:
        """One step's numbers.

        Args:
          step: the optimizer step they belong to.
          metrics: name -> scalar (device or host); a number that is not finite is written as null.
          timing: name -> seconds or rates, kept out of the reproducible file.
        """
        values = {name: float(np.asarray(value)) for name, value in metrics.items()}
        self._lines.write(_line({"global_step": step, **values}))
        if timing:
            self._timing.write(_line({"global_step": step, **timing}))
        if self._tensorboard is not None:
            for name, value in {**values, **(timing or {})}.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({**values, **(timing or {})}, step=step)

    def flush(self) -> None:
        """Hands everything written so far to the operating system."""
        self._lines.flush()
        self._timing.flush()

    def position(self) -> int:
        """Bytes of `metrics.jsonl` so far: what a checkpoint keeps."""
        self._lines.flush()
        return self._lines.tell()

    def rewind(self, position: int) -> None:
        """Forgets the lines written after a checkpoint that is being resumed from."""
        self._lines.flush()
        self._lines.truncate(position)
        self._lines.seek(position)

    def close(self) -> None:
        self._lines.close()
        self._timing.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read(path: pathlib.Path | str) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file, in order."""
    with pathlib.Path(path).open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _line(values: Mapping[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
    return json.dumps(finite) + "\n"

"""Where numbers go while a run goes on: a JSONL file always, TensorBoard by default, Weights & Biases on request.

The JSONL file holds only what the computation determines, so that two runs of the same config, or a resumed and an
unbroken one, have the same lines; clock times go to a file of their own.
"""

import io
import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np

logger = logging.getLogger(__name__)


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
        self._lines = _Lines(self.path)
        self._timing = _Lines(self._timing_path)
        self._events = _Events(directory / "tensorboard") if tensorboard else None
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
        """One step's numbers. They are kept until `flush` hands them on.

        Args:
          step: the optimizer step they belong to.
          metrics: name -> scalar (device or host); a number that is not finite is written as null.
          timing: name -> seconds or rates, kept out of the reproducible file.
        """
        values = {name: float(np.asarray(value)) for name, value in metrics.items()}
        self._lines.add(_line({"global_step": step, **values}))
        if timing:
            self._timing.add(_line({"global_step": step, **timing}))
        if self._events is not None:
            self._events.add(step, {**values, **(timing or {})})
        if self._wandb is not None:
            self._wandb.log({**values, **(timing or {})}, step=step)

    def flush(self) -> None:
        """Hands everything written so far to the operating system.

        Raises:
          OSError: it does not take it, for want of room perhaps. Nothing is lost: the next call tries again.
        """
        self._lines.flush()
        self._timing.flush()
        if self._events is not None:
            self._events.flush()

    def position(self) -> int:
        """Bytes of `metrics.jsonl` so far, safe on disk: what a checkpoint keeps.

        Raises:
          OSError: as for `flush`.
        """
        self.flush()
        return self._lines.position()

    def rewind(self, position: int) -> None:
        """Forgets the lines written after a checkpoint that is being resumed from."""
        self._lines.rewind(position)

    def close(self) -> None:
        """Flushes and closes.

        Raises:
          OSError: the last lines could not be written.
        """
        try:
            self.flush()
        finally:
            self._lines.close()
            self._timing.close()
            if self._events is not None:
                self._events.close()
            if self._wandb is not None:
                self._wandb.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close()
        except OSError as failure:
            if error is None:
                raise
            # The error on its way out is the news.
            logger.error("%s", failure)


class _Lines:
    """A file that lines are added to, and that may refuse to take them for a while."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._file = self._opened()
        self._waiting = b""

    def _opened(self) -> io.FileIO:
        # Unbuffered: what a full disk did not take is known to the byte.
        return self._path.open("ab", buffering=0)

    def add(self, line: str) -> None:
        self._waiting += line.encode()

    def flush(self) -> None:
        try:
            while self._waiting:
                taken = self._file.write(self._waiting)
                self._waiting = self._waiting[taken or 0 :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from None

    def position(self) -> int:
        os.fsync(self._file.fileno())
        # In a bucket that is mounted as a directory nothing is kept before a file is closed.
        self._file.close()
        self._file = self._opened()
        return self._file.tell()

    def rewind(self, position: int) -> None:
        self._waiting = b""
        length = os.fstat(self._file.fileno()).st_size
        if length < position:
            # Truncating to a greater length would fill the gap with zeros.
            logger.warning(
                "%s has %d bytes and had %d at the checkpoint: lines are lost",
                self._file.name,
                length,
                position,
            )
        self._file.truncate(min(position, length))
        self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        self._file.close()


class _Events:
    """TensorBoard's event files, which nobody needs to go on: when they cannot be written, that is said once.

    Written by the caller's thread. tensorboardX' own SummaryWriter leaves it to another one, which a full disk kills,
    and waits for it ever after.
    """

    def __init__(self, directory: pathlib.Path):
        from tensorboardX.event_file_writer import EventsWriter

        directory.mkdir(parents=True, exist_ok=True)
        # Files are named by the second: those of a run restarted within one must not meet.
        writer = EventsWriter(str(directory / "events"), f".{os.getpid()}")
        self._writer: Any = writer

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in numbers.items():
            event = Event(step=step, wall_time=time.time(), summary=scalar(name, value))
            self._try("write_event", event)

    def flush(self) -> None:
        self._try("flush")

    def close(self) -> None:
        self._try("close")

    def _try(self, act: str, *arguments: Any) -> None:
        if self._writer is None:
            return
        try:
            getattr(self._writer, act)(*arguments)
        except OSError as error:
            logger.error("no more TensorBoard events from this process: %s", error)
            self._writer = None


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

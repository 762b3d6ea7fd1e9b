"""Reference log-probabilities, computed once for a dataset and kept on disk for every run that starts from the same policy.

A file's name is a hash of all that decides the numbers: the weights, the network, the rows and the tokenizer. Another
learning rate, seed or loss reads the file; another weight, row or tokenizer does not find one.
"""

import dataclasses
import hashlib
import logging
import pathlib
import zipfile

import jax
import numpy as np
from jax.experimental import multihost_utils

from gvjax import checkpoint, distributed
from gvjax.digests import json_hash
from gvjax.recipes.ground import Ground
from gvjax.recipes.programs import score_all
from gvjax.types import Params, SequenceBatch

logger = logging.getLogger(__name__)

VERSION = 1
"""Of what is kept; raise it when the same weights and rows should give other numbers."""


def key_of(ground: Ground, params: Params, batch: SequenceBatch, tokenizer: str) -> str:
    """Hex digest of everything that decides the log-probabilities of a batch.

    Args:
      ground: its network; where the devices are does not matter.
      params: the reference policy; every array's digest counts.
      batch: rows as host arrays: tokens and masks count.
      tokenizer: its fingerprint. Ids alone would do for the numbers; a tokenizer that changed its mind is another dataset.
    """
    model = dataclasses.asdict(ground.model)
    # How the same mathematics is run.
    for name in ("remat", "scan_layers"):
        del model[name]
    return json_hash(
        {
            "version": VERSION,
            "model": model,
            "weights": checkpoint.digests(params),
            "rows": distributed.batch_digest(batch),
            "tokenizer": tokenizer,
        }
    )


def score_once(
    ground: Ground,
    params: Params,
    batch: SequenceBatch,
    *,
    directory: pathlib.Path | str | None,
    tokenizer: str = "",
) -> np.ndarray:
    """f32[B]: summed log-probability of each completion under the reference policy, nats; read from disk if it is there.

    The numbers that are kept are those that are returned, to the bit, so a run that finds them and one that made them
    are the same run. A file that does not hold what was written into it is said to be damaged and made again.

    Args:
      ground, params: the reference policy.
      batch: rows as host arrays; every process gives the same.
      directory: where files are kept; None computes every time.
      tokenizer: its fingerprint.
    """
    if directory is None:
        return score_all(ground, params, batch)
    path = pathlib.Path(directory) / f"{key_of(ground, params, batch, tokenizer)}.npz"
    first = jax.process_index() == 0
    found = _from_first(_read(path, len(batch.tokens)) if first else None, batch)
    if found is not None:
        logger.info("reference log-probabilities read from %s", path)
        return found
    logps = score_all(ground, params, batch)
    if first:
        _write(path, logps)
    return logps


def _from_first(found: np.ndarray | None, batch: SequenceBatch) -> np.ndarray | None:
    """What the first process found, on all of them: only it needs to see the directory."""
    if jax.process_count() == 1:
        return found
    none = np.zeros(len(batch.tokens), np.float32)
    mine = (np.array(found is not None), none if found is None else found)
    there, logps = multihost_utils.broadcast_one_to_all(mine)
    return np.asarray(logps) if there else None


def _digest(logps: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(logps, np.float32).tobytes()).hexdigest()


def _read(path: pathlib.Path, count: int) -> np.ndarray | None:
    """The numbers in a file, or None where there is none or it is not as it was written."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as kept:
            logps, digest = kept["logps"], str(kept["digest"])
        if logps.shape == (count,) and _digest(logps) == digest:
            return logps
        reason = "its numbers are not those that were written"
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error)
    logger.warning(
        "the reference log-probabilities in %s are damaged (%s); they are computed again",
        path,
        reason,
    )
    return None


def _write(path: pathlib.Path, logps: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, allow_pickle=False, logps=logps, digest=_digest(logps))
    partial.replace(path)

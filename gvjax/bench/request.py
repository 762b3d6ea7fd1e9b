"""What is asked of a benchmark, checked before anything is compiled."""

import dataclasses
from collections.abc import Sequence

from jax.sharding import Mesh

from gvjax import sharding
from gvjax.bench.timing import memory_limit
from gvjax.models import cost, shapes
from gvjax.models.config import ModelConfig

ROWS = {
    "sft": "a step of supervised fine-tuning on full-length sequences",
    "sft_packed": "the same on sequences of mixed lengths, packed: compare tokens/s with sft",
    "reward": "a step of a reward model on pairs",
    "dpo": "a step of DPO on pairs whose reference log-probabilities were computed before",
    "dpo_packed": "the same on pairs of mixed lengths, packed",
    "reference": "computing those: scoring pairs under the reference policy",
    "online_dpo": "a round of online DPO: generate, score, reference, update",
    "rloo": "a round of RLOO",
    "grpo": "a round of GRPO",
    "ppo": "a round of PPO, critic included",
    "prefill": "running prompts into an empty cache",
    "decode": "one step of decoding, a token for every row",
    "save": "writing the train state to disk, digests included",
    "restore": "reading it back, digests verified",
    "encode": "tokenising text into ids (bytes as tokens), rows a second",
    "data": "waiting for the next batch while SFT trains on it: the part called data is what the input pipeline costs",
}
"""Every row and what it times."""

ONLINE = ("online_dpo", "rloo", "grpo", "ppo")
PAIRED = ("reward", "dpo", "dpo_packed", "reference")
TRAINED = ("sft", "sft_packed", "reward", "dpo", "dpo_packed", *ONLINE, "save", "data")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much one call works on.

    Attributes:
      batch: sequences: rows of an SFT step, twice the pairs of a step on pairs, completions of an online round.
      prompt, completion: tokens of each.
      group: completions of one prompt in an online round.
    """

    batch: int
    prompt: int
    completion: int
    group: int

    @property
    def length(self) -> int:
        return self.prompt + self.completion


DEFAULT_SIZES = {
    "tiny": {"cpu": Sizes(32, 64, 64, 4), "accelerator": Sizes(512, 64, 64, 4)},
    "llama-30m": {"cpu": Sizes(8, 512, 128, 4), "accelerator": Sizes(64, 512, 128, 4)},
    "smollm2-135m": {
        "cpu": Sizes(4, 512, 128, 2),
        "accelerator": Sizes(64, 512, 128, 4),
    },
    "pythia-1.4b": {
        "cpu": Sizes(2, 512, 128, 2),
        "accelerator": Sizes(32, 512, 128, 4),
    },
    "llama-8b": {"cpu": Sizes(2, 512, 128, 2), "accelerator": Sizes(32, 512, 128, 4)},
}
"""Sizes by shape, for a laptop and for one accelerator."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A benchmark.

    Attributes:
      shape: name of the network.
      model: the network.
      sizes: how much one call works on.
      mesh: the devices.
      rows: names of what is timed.
      repeats: calls that count.
      share_prompts: rows of one prompt are trained on with it run once; None: where that is known to pay.
    """

    shape: str
    model: ModelConfig
    sizes: Sizes
    mesh: Mesh
    rows: tuple[str, ...]
    repeats: int
    share_prompts: bool | None = None

    @property
    def platform(self) -> str:
        return sharding.platform(self.mesh)


def chosen_rows(only: Sequence[str]) -> tuple[str, ...]:
    """The named rows in the table's order; all of them where none is named.

    Raises:
      ValueError: there is no such row.
    """
    unknown = [name for name in only if name not in ROWS]
    if unknown:
        raise ValueError(
            f"--only {unknown[0]}: there is no such row; use {', '.join(ROWS)}"
        )
    return tuple(name for name in ROWS if not only or name in only)


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes of the mesh axes from "fsdp=4,tensor=2"; what is not named is 1, and data takes the rest.

    Raises:
      ValueError: an axis is unknown or a size is no number.
    """
    sizes = {"data": -1, "fsdp": 1, "tensor": 1}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in sizes:
            raise ValueError(
                f"--mesh {text}: there is no axis {axis!r}; use {', '.join(sizes)}, as in fsdp=4,tensor=2"
            )
        try:
            sizes[axis] = int(size)
        except ValueError:
            raise ValueError(
                f"--mesh {text}: {axis}={size} is no whole number"
            ) from None
    return sizes


def parse_lengths(text: str) -> tuple[int, int]:
    """(prompt, completion) from "512+128".

    Raises:
      ValueError: it is not two lengths of at least 2.
    """
    parts = text.split("+")
    try:
        prompt, completion = map(int, parts)
    except ValueError:
        raise ValueError(
            f"--lengths {text}: give prompt and completion tokens, as in 512+128"
        ) from None
    if min(prompt, completion) < 2:
        raise ValueError(f"--lengths {text}: both must be at least 2")
    return prompt, completion


def make_request(
    *,
    shape: str,
    batch: int | None,
    lengths: str | None,
    group: int | None,
    dtype: str | None,
    remat: str,
    scan: bool | None,
    mesh: str,
    only: Sequence[str],
    repeats: int,
    share_prompts: bool | None = None,
) -> Request:
    """A request out of a command line, every size resolved and checked.

    Raises:
      ValueError: a size cannot be run; the message names the option, the rule and a size that would do.
    """
    axes = parse_mesh(mesh)
    devices = sharding.make_mesh(
        data=axes["data"], fsdp=axes["fsdp"], tensor=axes["tensor"]
    )
    accelerator = sharding.platform(devices) != "cpu"
    model = shapes.shape(
        shape,
        dtype=dtype or ("bfloat16" if accelerator else "float32"),
        remat=remat,
        scan_layers=scan,
    )
    sizes = DEFAULT_SIZES[shape]["accelerator" if accelerator else "cpu"]
    given: dict[str, int] = {}
    if lengths is not None:
        given["prompt"], given["completion"] = parse_lengths(lengths)
    given |= {
        name: value
        for name, value in (("batch", batch), ("group", group))
        if value is not None
    }
    request = Request(
        shape,
        model,
        dataclasses.replace(sizes, **given),
        devices,
        chosen_rows(only),
        repeats,
        share_prompts,
    )
    check(request)
    return request


def check(request: Request) -> None:
    """Refuses sizes that do not fit each other, the mesh or the memory.

    Raises:
      ValueError: as `make_request`.
    """
    sizes, mesh = request.sizes, request.mesh
    for name, least in (("batch", 2), ("group", 2)):
        if (value := getattr(sizes, name)) < least:
            raise ValueError(f"--{name} {value} must be at least {least}")
    if request.repeats < 1:
        raise ValueError(f"--repeats {request.repeats} must be at least 1")
    shards = sharding.batch_shards(mesh)
    per_row = {"a batch of sequences": 1}
    if any(row in PAIRED for row in request.rows):
        per_row["pairs"] = 2
    if any(row in ONLINE for row in request.rows):
        per_row["prompts"] = sizes.group
    for what, rows in per_row.items():
        unit = rows * shards
        if sizes.batch % unit:
            below = sizes.batch // unit * unit
            near = f"{below} or {below + unit}" if below else f"{unit}"
            raise ValueError(
                f"--batch {sizes.batch} makes no whole number of {what} ({rows} sequences each) on each of {shards}"
                f" devices; use {near}"
            )
    for name in ("num_heads", "kv_heads", "vocab_size"):
        sharding.check_tensor_size(mesh, getattr(request.model, name), name)
    _check_memory(request)


def needed_bytes(request: Request, row: str) -> int:
    """Bytes a row needs on one device at the very least: weights and train state; activations come on top."""
    params = cost.num_params(request.model)
    split = request.mesh.shape["fsdp"] * request.mesh.shape["tensor"]
    # The policy that everything starts from is kept in float32.
    copies = 4 * params
    if row in TRAINED:
        # And the gradient.
        copies += cost.state_bytes(params) + 4 * params
    if row in ONLINE:
        copies += 4 * params
    if row == "ppo":
        copies += cost.state_bytes(params)
    return copies // split


def _check_memory(request: Request) -> None:
    limit = memory_limit()
    if limit is None:
        return
    for row in request.rows:
        needed = needed_bytes(request, row)
        if needed > limit:
            fitting = [
                name for name in request.rows if needed_bytes(request, name) <= limit
            ]
            ways = [f"--only {','.join(fitting)}"] if fitting else []
            ways += ["more devices with --mesh fsdp=N", "a smaller --shape"]
            raise ValueError(
                f"--shape {request.shape}: row {row} needs at least {needed / 2**30:.1f} GiB on each device for its"
                f" weights and train state, and there are {limit / 2**30:.1f}; use {', '.join(ways)}"
            )

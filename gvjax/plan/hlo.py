"""What the text of a compiled program says: its collectives, over which mesh axes they run, its kernels, its largest array,
and its ways to the host.

Instructions inside a loop are counted as often as the loop runs at most, where its condition compares with a constant:
decoding may end earlier, when every row has drawn its EOS.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(
    rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(.*?(?:replica_groups|source_target_pairs)="
)
_GROUPS = re.compile(
    r"(?:replica_groups|source_target_pairs)="
    r"(\{\{.*?\}\}|\{\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|mesh\[.*?\](?:, device_ids=\(.*?\))? \{.*?\})"
)
_HOST = re.compile(
    r'custom_call_target="([^"]*(?:callback|Host)[^"]*)"'
    r"| (infeed|outfeed)\("
    r"| (send|recv)\(.*is_host_transfer=true"
)
_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|branch_computations|true_computation|false_computation)="
    r"\{?((?:%[\w.\-]+(?:, ?(?=%))?)+)"
)
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"%([\w.\-]+) = s(?:32|64)\[\]\S* constant\((\d+)\)")
_BOUND = re.compile(r" compare\(%[\w.\-]+, %([\w.\-]+)\), direction=LT")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over the same mesh axes.

    Attributes:
      kind: as XLA names it.
      axes: such as "fsdp" or "data x fsdp"; "part of fsdp" where the groups do not hold a whole axis.
      count: how often one runs in a call of the program.
      bytes: of their results on each device, in all.
      largest: the largest result, such as "bf16[4096,256]".
    """

    kind: str
    axes: str
    count: int
    bytes: int
    largest: str


def collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """The collectives of a compiled program, most bytes first.

    Args:
      text: `Compiled.as_text()`.
      mesh_shape: axis -> size, in the mesh's order; devices are numbered as the mesh lists them.
    """
    times = _times(text)
    found: dict[tuple[str, str], list[tuple[int, int, int, str]]] = defaultdict(list)
    computation = ""
    for line in text.splitlines():
        if opened := _COMPUTATION.match(line):
            computation = opened.group(1)
        if not (match := _COLLECTIVE.search(line)):
            continue
        groups = _GROUPS.search(line)
        if groups is None:
            continue
        kind = match.group(2)
        axes = _axes_of(_parse_groups(groups.group(1)), mesh_shape)
        if not axes:
            continue  # groups of one device: nothing moves
        if kind == "collective-permute":
            axes = axes.removeprefix("part of ")
        arriving = match.group(1)
        if f"{kind}-start(" in line:
            arriving = _results(arriving, kind)
        moved = [
            (math.prod(_ints(dims)) * _BYTES.get(dtype, 4), f"{dtype}[{dims}]")
            for dtype, dims in _SHAPE.findall(arriving)
        ]
        largest, shape = max(moved)
        size = sum(each for each, _ in moved)
        count = times.get(computation, 1)
        found[kind, axes].append((count, count * size, largest, shape))
    made = [
        Collective(
            kind,
            axes,
            count=sum(count for count, *_ in each),
            bytes=sum(size for _, size, *_ in each),
            largest=max((size, shape) for _, _, size, shape in each)[1],
        )
        for (kind, axes), each in found.items()
    ]
    return sorted(made, key=lambda each: -each.bytes)


def _results(text: str, kind: str) -> str:
    """The part of an asynchronous start's type that arrives: its second element, after the operands.

    `(operand, result)`, `((operands), (results))`, or with more behind; that of an all-reduce has results alone.
    """
    parts, depth = [""], 0
    for letter in text.removeprefix("(").removesuffix(")"):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return text if kind == "all-reduce" or not text.startswith("(") else parts[1]


def kernels(text: str) -> dict[str, int]:
    """How many calls of hand-written kernels stand in a compiled program, by the target's name."""
    counts: dict[str, int] = defaultdict(int)
    for name in re.findall(r'custom_call_target="([^"]+)"', text):
        if name == "tpu_custom_call" or name.startswith(("__cudnn$fmha", "__cudnn$")):
            counts[name] += 1
    return dict(counts)


def largest_array(text: str) -> str:
    """The shape of the array with most elements of any that a compiled program names, such as "f32[4096,256]".

    Also one that a fusion makes and reads without keeping it: what is not among them is nowhere in memory.
    """
    shapes = set(_SHAPE.findall(text))
    dtype, dims = max(shapes, key=lambda each: (math.prod(_ints(each[1])), each))
    return f"{dtype}[{dims}]"


def host_calls(text: str) -> list[str]:
    """How a compiled program reaches the host while it runs: callbacks into Python, infeed, outfeed, sends and receives."""
    return sorted({"".join(found) for found in _HOST.findall(text)})


def _times(text: str) -> dict[str, int]:
    """How often each computation runs in one call, by the lengths of the loops around it."""
    calls: dict[str, list[tuple[str, str, int]]] = defaultdict(list)
    constants: dict[str, int] = {}
    bounds: dict[str, list[str]] = defaultdict(list)
    entry, computation = "", ""
    for line in text.splitlines():
        if opened := _COMPUTATION.match(line):
            computation = opened.group(1)
            if line.startswith("ENTRY"):
                entry = computation
            continue
        if constant := _CONSTANT.search(line):
            constants[constant.group(1)] = int(constant.group(2))
        if bound := _BOUND.search(line):
            bounds[computation].append(bound.group(1))
        condition = _CONDITION.search(line) if " while(" in line else None
        told = _TRIPS.search(line) if condition else None
        for called in _CALLED.findall(line):
            for name in re.split(r", ?", called):
                of = condition.group(1) if condition else ""
                trips = int(told.group(1)) if told else 0
                calls[computation].append((name.lstrip("%"), of, trips))
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, factor: int) -> None:
        times[name] += factor
        for called, condition, trips in calls.get(name, ()):
            if condition and not trips:
                # On GPUs the comparison is in a fusion of its own.
                compared = [condition, *(name for name, *_ in calls[condition])]
                known = [
                    constants.get(name, 1) for each in compared for name in bounds[each]
                ]
                trips = known[0] if len(known) == 1 else 1
            visit(called, factor * (trips or 1))

    visit(entry, 1)
    return times


def _parse_groups(text: str) -> np.ndarray | list[list[int]]:
    """Groups of device numbers, from `{{0,1},{2,3}}`, `[2,2]<=[4]T(1,0)` or `mesh['a'=2,'b'=2] {'a'}`.

    The last names axes of a mesh of its own, with `device_ids=([2,2]T(1,0))` where its devices are not in order.
    """
    if text.startswith("mesh"):
        return _groups_of_mesh(text)
    if text.startswith("{"):
        return [
            [int(n) for n in group.split(",") if n.strip()]
            for group in re.findall(r"\{([\d, ]*)\}", text[1:-1])
        ]
    shape, _, rest = text.partition("<=")
    dims, _, order = rest.partition("T")
    numbers = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    if order:
        numbers = numbers.transpose(_ints(order))
    return numbers.reshape(_ints(shape)[0], -1)


def _groups_of_mesh(text: str) -> np.ndarray:
    names = re.findall(r"'([^']+)'=(\d+)", text)
    sizes = [int(size) for _, size in names]
    chosen = re.findall(r"'([^']+)'", text[text.rindex("{") :])
    numbers = np.arange(math.prod(sizes))
    if listed := re.search(r"device_ids=\((.*?)\) \{", text):
        dims, _, order = listed.group(1).partition("T")
        if dims.count("[") != 1:
            raise ValueError(f"replica groups of an unknown form: {text}")
        numbers = numbers.reshape(_ints(dims))
        if order:
            numbers = numbers.transpose(_ints(order))
    numbers = numbers.reshape(sizes)
    rest = [axis for axis, (name, _) in enumerate(names) if name not in chosen]
    picked = [axis for axis, (name, _) in enumerate(names) if name in chosen]
    width = math.prod(sizes[axis] for axis in picked)
    return numbers.transpose([*rest, *picked]).reshape(-1, width)


def _ints(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _axes_of(
    groups: np.ndarray | list[list[int]], mesh_shape: Mapping[str, int]
) -> str:
    """The mesh axes along which devices of one group differ, such as "fsdp"; "part of fsdp" where not all of it is in.

    Args:
      groups: numbers of devices; for a permutation, pairs. None at all means one group of everything.
      mesh_shape: axis -> size.
    """
    names, sizes = list(mesh_shape), list(mesh_shape.values())
    if not len(groups):
        groups = [list(range(math.prod(sizes)))]
    moved: set[int] = set()
    for group in groups:
        places = np.array(np.unravel_index(np.asarray(group, int), sizes))
        moved |= set(np.flatnonzero(np.ptp(places, axis=1)).tolist())
    if not moved:
        return ""
    whole = math.prod(sizes[axis] for axis in moved)
    label = " x ".join(names[axis] for axis in sorted(moved))
    return label if len(groups[0]) == whole else f"part of {label}"

"""Digests by which arrays and JSON are known again: equal content, equal digest, on any mesh and in any order of keys."""

import collections
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Json = Any
"""What `json.dumps` takes."""


def json_hash(value: Json) -> str:
    """SHA-256, in hex, of a JSON value: equal for equal content, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


_ON_HOST = 2**22
"""Elements up to which an array in a CPU's memory is digested without a program, whose compiling would take longer."""


def digests_of(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """A 32-bit digest of every array: the same on every mesh, another if any one element differs.

    Each element's bits are mixed with its index in the whole array by a bijection of 32-bit words, and the words are
    summed with wrap-around: the sum's order, and so the sharding, does not matter, and one changed element always
    changes the sum.
    """
    # One program per set of devices: jit takes no arguments from several.
    groups: dict[Any, dict[str, jax.Array]] = collections.defaultdict(dict)
    sums: dict[str, int] = {}
    for key, leaf in arrays.items():
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        devices: Any = leaf.sharding.device_set
        near = all(device.platform == "cpu" for device in devices)
        if near and leaf.is_fully_addressable and leaf.size <= _ON_HOST:
            sums[key] = int(_digest(np.asarray(leaf), np))
        else:
            groups[frozenset(devices)][key] = leaf
    for group in groups.values():
        found = jax.device_get(_digest_all(list(group.values())))
        sums.update((key, int(each)) for key, each in zip(group, found))
    return {key: sums[key] for key in arrays}


@jax.jit
def _digest_all(arrays: list[jax.Array]) -> list[jax.Array]:
    return [_digest(array, jnp) for array in arrays]


def _digest(array: Any, xp: Any) -> Any:
    """uint32[]: see `digests_of`; `xp` is numpy or jax.numpy, whichever has made the array."""
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = xp.stack([array.real, array.imag], axis=-1)
    # A scalar is no array to numpy, which warns where a scalar's product wraps around.
    array = array.reshape(array.shape or (1,))
    bits = 1 if array.dtype == bool else _bits(array.dtype)
    if bits < 8:
        words = array.astype(np.int32).astype(np.uint32)
    elif bits == 64:
        words = array[..., None].view(np.uint32)
    else:
        words = array.view(f"uint{bits}").astype(np.uint32)
    index, stride = xp.zeros((1,) * words.ndim, np.uint32), 1
    for axis in reversed(range(words.ndim)):
        along = xp.arange(words.shape[axis], dtype=np.uint32)
        along = along.reshape([-1 if each == axis else 1 for each in range(words.ndim)])
        index = index + along * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    # The finaliser of MurmurHash3: a bijection, so two contents of one element never meet.
    mixed = words ^ (index * np.uint32(0x9E3779B1))
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
    return xp.sum(mixed ^ (mixed >> 16), dtype=np.uint32)


def _bits(dtype: Any) -> int:
    integer = jnp.issubdtype(dtype, jnp.integer)
    return jnp.iinfo(dtype).bits if integer else jnp.finfo(dtype).bits

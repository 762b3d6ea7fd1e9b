"""The reference's log-probabilities on disk: found again for the same content, never for another."""

import dataclasses
import logging

import jax
import numpy as np
import pytest

from gvjax import sharding
from gvjax.models.config import ModelConfig
from gvjax.recipes import reference
from gvjax.recipes.ground import Ground
from gvjax.recipes.rows import role_key
from gvjax.types import SequenceBatch

MODEL = ModelConfig(vocab_size=16, embed_dim=8, num_layers=1, num_heads=2, mlp_dim=16)


@pytest.fixture(scope="module")
def ground():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return Ground(MODEL, mesh, None, 0, prompt_length=3, completion_length=5)


@pytest.fixture(scope="module")
def policy(ground):
    return ground.init_policy(role_key(0, "policy"))


@pytest.fixture
def batch():
    tokens = np.random.default_rng(0).integers(1, 16, (12, 8), dtype=np.int32)
    mask = np.broadcast_to(np.arange(8) >= 3, tokens.shape)
    return SequenceBatch(tokens, np.array(mask))


@pytest.fixture
def counted(monkeypatch):
    """How many times something is computed."""
    calls = []
    compute = reference.score_all

    def counting(*arguments):
        calls.append(arguments)
        return compute(*arguments)

    monkeypatch.setattr(reference, "score_all", counting)
    return calls


def test_computed_once_and_equal_to_the_bit(ground, policy, batch, counted, tmp_path):
    plain = reference.score_once(ground, policy, batch, directory=None)
    made = reference.score_once(ground, policy, batch, directory=tmp_path)
    assert len(counted) == 2
    found = reference.score_once(ground, policy, batch, directory=tmp_path)
    assert len(counted) == 2
    assert found.dtype == made.dtype == np.float32
    np.testing.assert_array_equal(found, made)
    np.testing.assert_array_equal(plain, made)
    assert [each.suffix for each in tmp_path.iterdir()] == [".npz"]


def test_other_weights_rows_masks_tokenizers_and_networks_are_other_content(
    ground, policy, batch
):
    def nudged(leaf):
        return leaf.at[(0,) * leaf.ndim].add(1e-6)

    def key(ground=ground, policy=policy, batch=batch, tokenizer="a"):
        return reference.key_of(ground, policy, batch, tokenizer)

    # One element of one array; one token; one position of a mask.
    weights = jax.tree_util.tree_map_with_path(
        lambda path, leaf: nudged(leaf) if "final_norm" in str(path) else leaf, policy
    )
    tokens, mask = np.array(batch.tokens), np.array(batch.completion_mask)
    tokens[-1, -1] = tokens[-1, -1] % 15 + 1
    mask[0, 3] = False
    network = dataclasses.replace(ground.model, rope_theta=9_999.0)
    keys = [
        key(),
        key(policy=weights),
        key(batch=dataclasses.replace(batch, tokens=tokens)),
        key(batch=dataclasses.replace(batch, completion_mask=mask)),
        key(tokenizer="b"),
        key(ground=dataclasses.replace(ground, model=network)),
    ]
    assert len(set(keys)) == len(keys)
    # How it is run is not what it is.
    recomputing = dataclasses.replace(ground.model, remat="full", scan_layers=True)
    assert key(ground=dataclasses.replace(ground, model=recomputing)) == keys[0]


@pytest.mark.parametrize("damage", ["flip", "cut", "rubbish", "short"])
def test_a_damaged_file_is_noticed_and_made_again(
    damage, ground, policy, batch, counted, tmp_path, caplog
):
    made = reference.score_once(ground, policy, batch, directory=tmp_path)
    (path,) = tmp_path.iterdir()
    if damage == "flip":
        # The container's own checksum is right: only ours can tell.
        np.savez(path, logps=made + 1e-3, digest=reference._digest(made))
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "rubbish":
        path.write_bytes(b"not a zip file")
    else:
        np.savez(path, logps=made[:-1], digest=reference._digest(made[:-1]))
    with caplog.at_level(logging.WARNING):
        again = reference.score_once(ground, policy, batch, directory=tmp_path)
    assert "are damaged" in caplog.text and str(path) in caplog.text
    np.testing.assert_array_equal(again, made)
    assert len(counted) == 2
    reference.score_once(ground, policy, batch, directory=tmp_path)
    assert len(counted) == 2

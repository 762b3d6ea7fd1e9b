"""Token log-probabilities: alignment by hand, chunked against dense, entropy and KL against enumeration."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from gvjax import logps


def test_alignment_by_hand():
    p = np.array([[[0.9, 0.1], [0.3, 0.7], [0.5, 0.5]]])
    tokens = jnp.array([[1, 0, 1]])
    np.testing.assert_allclose(
        logps.token_logps(jnp.log(p), tokens),
        [[0.0, np.log(0.9), np.log(0.7)]],
        rtol=1e-6,
    )


class ChunkedTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(
        chunk_size=[1, 5, 12, 18, 1000],
        cap=[None, 3.0],
    )
    def test_equals_dense_forward_and_backward(self, chunk_size, cap):
        rng = np.random.default_rng(chunk_size)
        hidden = jnp.asarray(rng.normal(size=(3, 7, 4)), jnp.float32)
        unembed = jnp.asarray(rng.normal(size=(4, 11)), jnp.float32)
        tokens = jnp.asarray(rng.integers(0, 11, (3, 7)), jnp.int32)
        weights = jnp.asarray(rng.normal(size=(3, 7)), jnp.float32)
        capped = None if cap is None else (lambda x: cap * jnp.tanh(x / cap))

        def dense(hidden, unembed):
            scores = hidden @ unembed
            return logps.token_logps(
                scores if capped is None else capped(scores), tokens
            )

        def chunked(hidden, unembed):
            return logps.chunked_token_logps(
                hidden, unembed, tokens, chunk_size=chunk_size, logits_fn=capped
            )

        np.testing.assert_allclose(
            self.variant(chunked)(hidden, unembed), dense(hidden, unembed), atol=1e-6
        )

        def gradients(function):
            return jax.grad(
                lambda h, u: jnp.sum(function(h, u) * weights), argnums=(0, 1)
            )

        chex.assert_trees_all_close(
            self.variant(gradients(chunked))(hidden, unembed),
            gradients(dense)(hidden, unembed),
            atol=2e-6,
        )

    def test_the_full_logits_never_exist(self):
        vocabulary, positions, chunk = 5000, 4 * 63, 16
        function = jax.jit(
            jax.grad(
                lambda h, u, t: jnp.sum(
                    logps.chunked_token_logps(h, u, t, chunk_size=chunk)
                )
            )
        )
        text = function.lower(
            jax.ShapeDtypeStruct((4, 64, 8), jnp.float32),
            jax.ShapeDtypeStruct((8, vocabulary), jnp.float32),
            jax.ShapeDtypeStruct((4, 64), jnp.int32),
        ).compile()
        temporary = text.memory_analysis().temp_size_in_bytes
        self.assertLess(temporary, positions * vocabulary * 4 / 2)

    @parameterized.parameters((None, 16), (5, 16), (None, 700))
    def test_a_turned_matrix_is_the_same_one(self, chunk_size, vocabulary):
        rng = np.random.default_rng(3)
        hidden = jnp.asarray(rng.normal(size=(2, 200, 8)), jnp.float32)
        matrix = jnp.asarray(rng.normal(size=(8, vocabulary)), jnp.float32)
        tokens = jnp.asarray(rng.integers(0, vocabulary, (2, 200)), jnp.int32)
        scored = jnp.arange(200) > jnp.array([[150], [40]])

        def total(hidden, matrix, turned):
            result = logps.chunked_token_logps(
                hidden,
                matrix,
                tokens,
                chunk_size=chunk_size,
                scored=scored,
                turned=turned,
            )
            return jnp.sum(jnp.square(result))

        grad = jax.value_and_grad(total, argnums=(0, 1))
        loss, (of_hidden, of_matrix) = grad(hidden, matrix, False)
        got, (of_hidden_turned, of_turned) = grad(hidden, matrix.T, True)
        np.testing.assert_allclose(got, loss, rtol=1e-5)
        np.testing.assert_allclose(of_hidden_turned, of_hidden, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(of_turned.T, of_matrix, rtol=1e-4, atol=1e-4)

    def test_a_chunk_of_nothing_is_refused(self):
        with pytest.raises(ValueError, match="chunk_size is 0"):
            logps.chunked_token_logps(
                jnp.ones((1, 2, 3)),
                jnp.ones((3, 4)),
                jnp.ones((1, 2), int),
                chunk_size=0,
            )


class ScoredTest(parameterized.TestCase):
    """The logits of 320 · 2 positions are cut into two pieces, or with a chunk size into more."""

    def setUp(self):
        super().setUp()
        rng = np.random.default_rng(0)
        self.hidden = jnp.asarray(rng.normal(size=(2, 321, 4)), jnp.float32)
        self.unembed = jnp.asarray(rng.normal(size=(4, 900)), jnp.float32)
        self.tokens = jnp.asarray(rng.integers(0, 900, (2, 321)), jnp.int32)
        self.weights = jnp.asarray(rng.normal(size=(2, 321)), jnp.float32)

    def gradients(self, scored, **options):
        def total(hidden, unembed):
            result = logps.chunked_token_logps(
                hidden, unembed, self.tokens, scored=scored, **options
            )
            return jnp.sum(result * self.weights), result

        grad = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
        return jax.jit(grad)(self.hidden, self.unembed)

    @parameterized.product(chunk_size=[None, 100], share=[0.0, 0.3, 1.0])
    def test_what_is_scored_is_what_it_was_and_the_rest_is_0(self, chunk_size, share):
        scored = np.random.default_rng(1).random((2, 321)) < share
        ((_, found), found_grads) = self.gradients(
            jnp.asarray(scored), chunk_size=chunk_size
        )
        all_logps = logps.chunked_token_logps(self.hidden, self.unembed, self.tokens)
        expected = np.where(scored, all_logps, 0.0)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        self.weights = jnp.where(scored, self.weights, 0.0)
        _, expected_grads = self.gradients(None)
        chex.assert_trees_all_close(found_grads, expected_grads, atol=1e-5)

    @parameterized.parameters((None, 0), (None, 320), (100, 92))
    def test_chunks_of_nothing_scored_are_never_run(self, chunk_size, count):
        """What is not scored is not a number, and just fills the chunks behind: it would turn the gradient into it."""
        places = np.random.default_rng(2).permutation(2 * 320)[:count]
        scored = np.zeros((2, 321), bool)
        scored[places // 320, 1 + places % 320] = True
        read = jnp.asarray(np.pad(scored[:, 1:], ((0, 0), (0, 1))))
        self.hidden = jnp.where(read[..., None], self.hidden, jnp.nan)
        results = self.gradients(jnp.asarray(scored), chunk_size=chunk_size)
        chex.assert_tree_all_finite(results)


class LowPrecisionTest(chex.TestCase):
    def test_bfloat16_inputs_give_float32_logps(self):
        rng = np.random.default_rng(0)
        logits = jnp.asarray(rng.normal(size=(2, 5, 9)), jnp.bfloat16)
        tokens = jnp.asarray(rng.integers(0, 9, (2, 5)), jnp.int32)
        result = logps.token_logps(logits, tokens)
        self.assertEqual(result.dtype, jnp.float32)
        np.testing.assert_allclose(
            result, logps.token_logps(logits.astype(jnp.float32), tokens), rtol=1e-6
        )
        hidden, unembed = logits, jnp.asarray(rng.normal(size=(9, 9)), jnp.bfloat16)
        self.assertEqual(
            logps.chunked_token_logps(hidden, unembed, tokens).dtype, jnp.float32
        )


class EntropyAndKlTest(chex.TestCase):
    def test_entropy_by_hand(self):
        p = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
        with np.errstate(divide="ignore"):
            logits = jnp.asarray(np.log(p))
        expected = [
            np.log(2),
            0.0,
            -(0.2 * np.log(0.2) + 0.3 * np.log(0.3) + 0.5 * np.log(0.5)),
        ]
        np.testing.assert_allclose(logps.entropy(logits), expected, atol=1e-6)
        gradient = jax.grad(lambda x: jnp.sum(logps.entropy(x)))(logits)
        self.assertTrue(bool(jnp.all(jnp.isfinite(gradient))))

    def test_estimators_against_enumeration(self):
        rng = np.random.default_rng(1)
        p, q = (rng.dirichlet(np.ones(6)) for _ in range(2))
        exact = np.sum(p * np.log(p / q))
        logp, logq = jnp.log(p), jnp.log(q)
        for estimator in (logps.kl_k1, logps.kl_k3):
            np.testing.assert_allclose(
                np.sum(p * estimator(logp, logq)), exact, rtol=1e-5
            )
        self.assertGreaterEqual(float(jnp.min(logps.kl_k3(logp, logq))), 0.0)
        np.testing.assert_allclose(
            logps.kl_k2(logp, logq), 0.5 * np.log(p / q) ** 2, rtol=1e-4
        )

    def test_k3_keeps_its_digits_near_zero(self):
        tiny = 1e-4
        np.testing.assert_allclose(
            logps.kl_k3(jnp.float32(0.0), jnp.float32(tiny)), tiny**2 / 2, rtol=1e-2
        )

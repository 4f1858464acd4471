"""The loss in chunks, and its gradients, against plain cross-entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlinformer_jax.training import loss as loss_module
from tlinformer_jax.training.loss import summed_losses_and_hits, token_losses_and_hits


def loss_inputs(length: int, vocab: int = 11, dtype=jnp.float32):
    """hidden, embedding, labels, weights of three sequences."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((3, length, 8)), dtype)
    table = jnp.asarray(rng.standard_normal((vocab, 8)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, vocab, (3, length)))
    return hidden, table, labels, jnp.asarray(rng.random((3, length)), jnp.float32)


def plain_losses(hidden, table, labels):
    logits = hidden.astype(jnp.float32) @ table.T
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]


LOSS_SHAPES = pytest.mark.parametrize(("chunk", "length"), [(1, 7), (8, 7), (12, 9), (10_000, 5)])


@LOSS_SHAPES
def test_chunked_loss_equals_plain_cross_entropy(chunk, length):
    hidden, table, labels, _ = loss_inputs(length)
    truth = plain_losses(hidden, table, labels)
    np.testing.assert_allclose(token_losses_and_hits(hidden, table, labels, chunk)[0], truth, atol=1e-5)


@LOSS_SHAPES
@pytest.mark.parametrize("multiple", [1, 128])
def test_z_loss_changes_the_gradient_alone(chunk, length, multiple, monkeypatch):
    monkeypatch.setattr(loss_module, "padded_vocabulary", lambda size, dtype: size + -size % multiple)
    hidden, table, labels, weights = loss_inputs(length)

    def ours(hidden, table):
        return 3 * summed_losses_and_hits(hidden, table, labels, weights, chunk, 0.1)[0]

    def plain(hidden, table):
        norm = jax.nn.logsumexp(hidden @ table.T, axis=-1)
        return 3 * ((plain_losses(hidden, table, labels) + 0.1 * norm**2) * weights).sum()

    loss, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(hidden, table)
    np.testing.assert_allclose(loss, 3 * (plain_losses(hidden, table, labels) * weights).sum(), rtol=1e-6)
    for value, expectation in zip(gradients, jax.jit(jax.grad(plain, argnums=(0, 1)))(hidden, table), strict=True):
        np.testing.assert_allclose(value, expectation, rtol=1e-5, atol=1e-5)


@LOSS_SHAPES
@pytest.mark.parametrize("multiple", [1, 128])
def test_training_loss_and_its_gradients_equal_plain_cross_entropy(chunk, length, multiple, monkeypatch):
    """Of hidden states, embedding and weights; with the vocabulary padded and without."""
    monkeypatch.setattr(loss_module, "padded_vocabulary", lambda size, dtype: size + -size % multiple)
    hidden, table, labels, weights = loss_inputs(length)

    def ours(hidden, table, weights):
        return 3 * summed_losses_and_hits(hidden, table, labels, weights, chunk)[0]

    def plain(hidden, table, weights):
        return 3 * (plain_losses(hidden, table, labels) * weights).sum()

    inputs = (hidden, table, weights)
    np.testing.assert_allclose(ours(*inputs), plain(*inputs), rtol=1e-6)
    loss, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(*inputs)
    truth, expected = jax.jit(jax.value_and_grad(plain, argnums=(0, 1, 2)))(*inputs)
    np.testing.assert_allclose(loss, truth, rtol=1e-6)
    for value, expectation in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(value, expectation, rtol=1e-5, atol=1e-5)


def dot_products(jaxpr):
    """All products of a jaxpr and of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from dot_products(inner)


def test_training_loss_multiplies_in_half_precision_and_computes_logits_once():
    hidden, table, labels, weights = loss_inputs(16, vocab=131, dtype=jnp.bfloat16)

    def loss(hidden, table):
        return summed_losses_and_hits(hidden, table, labels, weights, 8)[0]

    products = list(dot_products(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, table).jaxpr))
    assert len(products) == 3
    for product in products:
        assert {operand.aval.dtype.name for operand in product.invars} == {"bfloat16"}
        assert any(256 in operand.aval.shape for operand in (*product.invars, *product.outvars))
    gradient = jax.grad(loss, argnums=1)(hidden, table)
    truth = jax.grad(lambda table: (plain_losses(hidden, table, labels) * weights).sum())(table)
    assert gradient.dtype == jnp.float32
    assert jnp.linalg.norm(gradient - truth) < 0.01 * jnp.linalg.norm(truth)


def test_chunked_loss_never_holds_all_logits():
    tokens, vocab = 64, 5000
    hidden, table = jnp.zeros((1, tokens, 8)), jnp.zeros((vocab, 8))
    labels = jnp.zeros((1, tokens), jnp.int32)
    weights = jnp.ones(labels.shape)

    def memory(chunk):
        loss = jax.grad(lambda h, t: summed_losses_and_hits(h, t, labels, weights, chunk)[0], argnums=(0, 1))
        return jax.jit(loss).lower(hidden, table).compile().memory_analysis().temp_size_in_bytes

    assert memory(8) < 0.5 * memory(tokens)

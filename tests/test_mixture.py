"""The mixture of experts of a layer, and its router's losses, against NumPy in float64 and loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import reference
from tests.test_experts import EXPERTS, golden_scale
from tlinformer_jax import build_model
from tlinformer_jax.models import feed_forward as module
from tlinformer_jax.models.feed_forward import Router, feed_forward
from tlinformer_jax.models.model import prepare_params
from tlinformer_jax.parallel.mesh import target

D, F, E = 6, 7, 4
ROWS = (2, 9)


def arrays(seed: int = 0, experts: int = E) -> tuple[np.ndarray, ...]:
    """Rows, a router's kernel, and kernels of experts, float64."""
    rng = np.random.default_rng(seed)
    shapes = ((*ROWS, D), (D, experts), (experts, D, 2, F), (experts, F, D))
    return tuple(rng.standard_normal(shape) for shape in shapes)


def by_loop(top: int, x, router, gate_up, down) -> np.ndarray:
    """The mixture, row by row and expert by expert."""
    output = np.zeros_like(x)
    for place in np.ndindex(*x.shape[:-1]):
        (shares,) = reference.expert_shares(x[place][None] @ router, top)
        for expert in np.flatnonzero(shares):
            gate, up = np.einsum("d,dpf->pf", x[place], gate_up[expert])
            output[place] += shares[expert] * (gate / (1 + np.exp(-gate)) * up) @ down[expert]
    return output


def mixture(top: int, x, router, gate_up, down) -> jax.Array:
    return feed_forward(Router(router, top), gate_up, down, x)


compiled_mixture = jax.jit(mixture, static_argnums=0)  # for the CPU


def slope(function, values, number: int, direction: np.ndarray, step: float = 1e-5) -> float:
    """Of a function in float64, along a direction of one of its arguments."""
    moved = [[*values[:number], values[number] + sign * step * direction, *values[number + 1 :]] for sign in (1, -1)]
    return (function(*moved[0]) - function(*moved[1])) / (2 * step)


# ---- The mixture


@pytest.mark.parametrize("top", [1, 2, 3, E])
def test_values_and_gradients_are_those_of_a_loop(top):
    values, reads = arrays(), np.random.default_rng(1).standard_normal((*ROWS, D))
    narrow = [jnp.asarray(array, jnp.float32) for array in values]
    np.testing.assert_allclose(compiled_mixture(top, *narrow), by_loop(top, *values), atol=1e-4, rtol=1e-4)
    gradients = jax.jit(jax.grad(lambda *given: jnp.sum(mixture(top, *given) * reads), argnums=(0, 1, 2, 3)))(*narrow)
    for number, gradient in enumerate(gradients):
        direction = np.random.default_rng(number).standard_normal(gradient.shape)
        expected = slope(lambda *given: np.sum(by_loop(top, *given) * reads), values, number, direction)
        assert np.sum(gradient * direction) == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("rows", [(1, 1), (2, 61), (1, 400)])
def test_many_rows_and_unequal_shares_on_each_platform(rows, platform):
    """Blocks of 1, 16 and 25 rows; the second expert gets none, the third most."""
    random = np.random.default_rng(2)
    _, router, gate_up, down = arrays()
    x, reads = random.standard_normal((*rows, D)), random.standard_normal((*rows, D))
    x[..., 0], router[0] = 1, (0, -100, 3, 0)
    values = (x, router, gate_up, down)
    narrow = [jnp.asarray(array, jnp.float32) for array in values]
    with target(platform, "any"):
        found = jax.jit(lambda *given: mixture(2, *given))(*narrow)
        loss = jax.jit(jax.grad(lambda *given: jnp.sum(mixture(2, *given) * reads), argnums=(0, 1, 2, 3)))
        gradients = loss(*narrow)
    np.testing.assert_allclose(found, by_loop(2, *values), atol=1e-4, rtol=1e-4)
    for number, gradient in enumerate(gradients):
        direction = random.standard_normal(gradient.shape)
        expected = slope(lambda *given: np.sum(by_loop(2, *given) * reads), values, number, direction)
        assert np.sum(gradient * direction) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_one_expert_is_the_ordinary_feed_forward():
    x, router, gate_up, down = (jnp.asarray(array, jnp.float32) for array in arrays(experts=1))
    dense = jax.jit(functools.partial(feed_forward, None))(gate_up[0], down[0], x)
    np.testing.assert_allclose(compiled_mixture(1, x, router, gate_up, down), dense, rtol=1e-5, atol=1e-5)
    alike = [np.repeat(router, 3, axis=1), *(np.repeat(array, 3, axis=0) for array in (gate_up, down))]
    np.testing.assert_allclose(compiled_mixture(2, x, *alike), dense, rtol=1e-5, atol=1e-5)


def test_the_order_of_experts_does_not_matter():
    x, router, gate_up, down = (array.astype(np.float32) for array in arrays())
    order = np.array([2, 0, 3, 1])
    moved = compiled_mixture(2, x, router[:, order], gate_up[order], down[order])
    np.testing.assert_allclose(moved, compiled_mixture(2, x, router, gate_up, down), rtol=1e-5, atol=1e-5)
    wrong = compiled_mixture(2, x, router[:, order], gate_up, down)
    assert np.abs(wrong - moved).max() > 0.1


@pytest.mark.parametrize("expert", [0, E - 1])
def test_no_row_is_dropped_where_all_take_one_expert(expert):
    x, router, gate_up, down = arrays()
    x[..., 0], router[0, expert] = 1, 100
    found = compiled_mixture(1, *(array.astype(np.float32) for array in (x, router, gate_up, down)))
    gate, value = np.moveaxis(np.einsum("bld,dpf->blpf", x, gate_up[expert]), 2, 0)
    np.testing.assert_allclose(found, (gate / (1 + np.exp(-gate)) * value) @ down[expert], rtol=1e-4, atol=1e-4)


def test_routers_stay_float32_in_a_model_of_half_precision():
    config = dataclasses.replace(EXPERTS, architecture="transformer", dtype="bfloat16")
    model = build_model(config)
    params = model.apply({"params": golden_scale(config)}, method=model.parameters)
    layer = prepare_params(params, config).layers[0]
    assert (layer.router.kernel.dtype, layer.down_kernel.dtype) == (jnp.float32, jnp.bfloat16)
    rows = jnp.asarray(np.random.default_rng(0).standard_normal((1, 50, 16)), jnp.bfloat16)
    expected = np.asarray(rows, np.float64) @ np.asarray(layer.router.kernel, np.float64)
    np.testing.assert_allclose(module.router_logits(layer.router, rows), expected, rtol=1e-5, atol=1e-5)


# ---- The router's losses


def losses_by_loop(x: np.ndarray, router: np.ndarray, top: int) -> tuple[float, np.ndarray]:
    """Of rows [rows, D]: both losses, and the rows of each expert."""
    logits, experts = x @ router, router.shape[1]
    taken, mean, z = np.zeros(experts), np.zeros(experts), 0.0
    for values in logits:
        total = np.exp(values).sum()
        taken[np.argsort(-values)[:top]] += 1
        mean += np.exp(values) / total / len(logits)
        z += np.log(total) ** 2 / len(logits)
    return 0.01 * experts * (taken / taken.sum() * mean).sum() + 0.001 * z, taken


@pytest.mark.parametrize("top", [1, 3])
def test_gradients_are_those_with_the_losses_of_rows_that_are_read(top):
    """The output's value and other gradients are as without; rows that nobody reads do not count."""
    values = arrays(3)
    x, router = values[:2]
    reads = np.random.default_rng(1).standard_normal((*ROWS, D))
    reads[0, 5:] = 0
    read = np.concatenate([x[0, :5], x[1]])
    narrow = [jnp.asarray(array, jnp.float32) for array in values]

    def summed(x, router, gate_up, down, weight, tally):
        return jnp.sum(feed_forward(Router(router, top, weight, tally), gate_up, down, x) * reads)

    def plain(*given):
        return jnp.sum(mixture(top, *given) * reads)

    function = jax.jit(jax.value_and_grad(summed, argnums=range(6)))
    loss, found = function(*narrow, jnp.float32(7), jnp.zeros(E))
    plain_loss, gradients = jax.jit(jax.value_and_grad(plain, argnums=range(4)))(*narrow)
    assert loss == plain_loss
    expected, taken = losses_by_loop(read, router, top)
    assert found[4] == pytest.approx(expected, rel=1e-5)
    np.testing.assert_array_equal(found[5], taken)
    direction = np.random.default_rng(2).standard_normal(router.shape)
    moved = slope(lambda router: losses_by_loop(read, router, top)[0], [router], 0, direction)
    assert np.sum((found[1] - gradients[1]) * direction) == pytest.approx(7 * moved, rel=1e-3)
    assert np.abs(found[0] - gradients[0])[0, :5].min() > 0, "the losses' gradient goes on to the rows"
    np.testing.assert_array_equal((found[0] - gradients[0])[0, 5:], 0)
    for number in (2, 3):
        np.testing.assert_array_equal(found[number], gradients[number])

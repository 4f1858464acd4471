"""The GPU kernels of training, interpreted on the CPU, against plain formulas in float64 and automatic gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlinformer_jax.kernels import common
from tlinformer_jax.kernels import loss as loss_kernel
from tlinformer_jax.kernels import norm as norm_kernel
from tlinformer_jax.models import layers
from tlinformer_jax.models.recompute import map_steps
from tlinformer_jax.models.windows import in_chunks, joined
from tlinformer_jax.parallel.mesh import target
from tlinformer_jax.training import loss as loss


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def plain_layer_norm(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + layers.LAYER_NORM_EPSILON) * scale + bias


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("shape", [(3, 7, 36), (2, 30, 20)])  # rows that fill no tile, several tiles a program
@pytest.mark.parametrize("by_kernel", [True, False])
def test_layer_norm_gradients(shape, skips, by_kernel, monkeypatch):
    monkeypatch.setattr(norm_kernel, "PROGRAMS", 3)
    if by_kernel:
        real = norm_kernel.layer_norm_backward
        monkeypatch.setattr(layers, "usable", lambda *_: True)
        monkeypatch.setattr(norm_kernel, "layer_norm_backward", lambda *arrays: real(*arrays, interpret=True))
    x, gradient, skip = 3 * normal(0, *shape) + 1, normal(1, *shape), normal(2, *shape)
    scale, bias = normal(3, shape[-1]), normal(4, shape[-1])

    def total(x, scale, bias):
        if not skips:
            return (layers.layer_norm(x, scale, bias) * gradient).sum()
        same, normed = layers.norm_branch(x, scale, bias)
        return (normed * gradient).sum() + (same * skip).sum()

    def truth(x, scale, bias):
        return (plain_layer_norm(x, scale, bias) * gradient).sum() + (x * skip).sum() * skips

    np.testing.assert_allclose(layers.layer_norm(x, scale, bias), plain_layer_norm(x, scale, bias), atol=1e-5)
    ours, true = (jax.jit(jax.grad(function, (0, 1, 2)))(x, scale, bias) for function in (total, truth))
    for value, expected in zip(ours, true, strict=True):
        np.testing.assert_allclose(value, expected, atol=2e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize(("vocab_size", "columns"), [(37, 48), (32, 48), (64, 64)])
def test_loss_and_slope(vocab_size, columns, z_loss, monkeypatch):
    monkeypatch.setattr(loss_kernel, "COLUMNS", 16)
    logits, weights = 10 * normal(0, 5, columns), jnp.array([1.0, 0.5, 0.0, 2.0, 1.0])
    targets = jnp.array([0, 3, vocab_size - 1, 7, 9])

    def losses(logits):
        return -jax.nn.log_softmax(logits[:, :vocab_size])[jnp.arange(5), targets]

    def trained(logits):
        norm = jax.nn.logsumexp(logits[:, :vocab_size], axis=-1)
        return ((losses(logits) + z_loss * norm**2) * weights).sum()

    how = {"z_loss": z_loss, "interpret": True}
    found, slope = loss_kernel.loss_and_slope(logits, targets, weights, vocab_size, jnp.float32, **how)
    np.testing.assert_allclose(found, losses(logits), atol=1e-5)
    np.testing.assert_allclose(slope, jax.jit(jax.grad(trained))(logits), atol=2e-5)


def test_the_loss_by_the_kernel_equals_the_plain_one(monkeypatch):
    """Loss and gradients of whole chunks, the last one filled up, in half precision as a GPU takes them."""
    hidden, table = normal(0, 3, 10, 8).astype(jnp.bfloat16), 0.5 * normal(1, 45, 8)
    labels = jnp.asarray(np.random.default_rng(2).integers(0, 45, (3, 10)))
    weights = jnp.abs(normal(3, 3, 10))

    def outcome():
        def total(hidden, table):
            return loss.summed_losses_and_hits(hidden, table, labels, weights, 12, 0.01)[0]

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(hidden, table)

    expected, real = outcome(), loss_kernel.loss_and_slope
    monkeypatch.setattr(loss_kernel, "COLUMNS", 16)
    monkeypatch.setattr(loss, "usable", lambda *_: True)
    monkeypatch.setattr(loss_kernel, "loss_and_slope", lambda *arguments: real(*arguments, interpret=True))
    found = outcome()
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-5)
    for value, truth in zip(found[1], expected[1], strict=True):
        difference = jnp.linalg.norm((value - truth).astype(jnp.float32))
        assert difference <= 2e-3 * jnp.linalg.norm(truth.astype(jnp.float32))


@pytest.mark.parametrize("devices", [1, 2])
def test_kernels_run_on_one_device_only(devices, monkeypatch):
    """XLA cannot split them over a mesh, and would compute them as a whole on every device."""
    monkeypatch.setattr(common, "available", lambda name: True)
    with jax.set_mesh(jax.make_mesh((devices,), ("data",))):
        assert common.usable("loss", jnp.bfloat16) == (devices == 1)
        assert not common.usable("norm", jnp.float32)


def test_the_norms_kernel_is_not_given_what_it_does_not_take(monkeypatch):
    """Rows that would not fit its registers, and a first window's history, which has none."""
    monkeypatch.setattr(layers, "usable", lambda *_: True)
    monkeypatch.setattr(norm_kernel, "layer_norm_backward", None)
    monkeypatch.setattr(norm_kernel, "MOST_WIDTH", 16)

    def slope(*shape):
        scale = jnp.ones(shape[-1])
        total = lambda x: layers.layer_norm(x, scale, scale).sum().astype(jnp.float32)  # noqa: E731
        return jax.grad(total)(jnp.ones(shape, jnp.bfloat16))

    for shape in ((2, 17), (0, 8)):
        assert slope(*shape).shape == shape
    with pytest.raises(TypeError, match="not callable"):
        slope(2, 8)


def test_rows_past_the_count_are_not_computed():
    """Two of four chunks of two rows; the others' rows are not even finite."""
    weight, rows = jnp.float32(3), jnp.array([[1.0, 2, 3, 4, jnp.nan, jnp.nan, jnp.nan, jnp.nan]])

    def branch(weight, offset, item):
        part, number = item
        return weight * part**2 + number * offset

    def outputs(weight, rows):
        return joined(map_steps(branch, weight, in_chunks(rows, 2), jnp.float32(10), jnp.int32(2)))

    found, pull = jax.vjp(outputs, weight, rows)
    np.testing.assert_array_equal(found, [[3, 12, 37, 58, 0, 0, 0, 0]])
    weight_gradient, row_gradients = pull(jnp.ones((1, 8)))
    assert float(weight_gradient) == 30
    np.testing.assert_array_equal(row_gradients, [[6, 12, 18, 24, 0, 0, 0, 0]])
    more = joined(map_steps(branch, weight, in_chunks(rows, 2), jnp.float32(10), jnp.int32(9)))
    np.testing.assert_array_equal(more[:, :4], found[:, :4])


@pytest.mark.parametrize("missing", [ImportError("No module named triton"), NotImplementedError("no such operation")])
def test_where_pallas_cannot_lower_for_the_gpu_plain_jax_serves(missing, monkeypatch):
    def refused(*_, **__):
        raise missing

    monkeypatch.setattr(common, "call_kernel", refused)
    common.why_no_triton.cache_clear()
    try:
        with target("gpu", "NVIDIA H100 80GB HBM3"):
            assert not any(map(common.available, common.OPERATIONS))
            assert str(missing) in common.serving()
    finally:
        common.why_no_triton.cache_clear()


def test_with_a_working_back_end_every_operation_has_its_kernel():
    pytest.importorskip("jax.experimental.pallas.triton")
    assert "not an NVIDIA GPU" in common.serving()
    with target("gpu", "NVIDIA H100 80GB HBM3"):
        assert all(map(common.available, common.OPERATIONS))
        assert "token step" in common.serving()

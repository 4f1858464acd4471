"""Gated DeltaNet: chunks, steps and a NumPy reference in float64 agree; decoding and devices change nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import test_training
from tests.decoding.test_exactness import compared, largest_error, make_decoder
from tests.support import golden, reference
from tests.support.models import SMALL
from tlinformer_jax import ModelConfig, build_model
from tlinformer_jax.config.delta import delta_shape
from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.config.model import RECURRENT
from tlinformer_jax.decoding import cache as cache_module
from tlinformer_jax.decoding import layered
from tlinformer_jax.decoding.cache import LayeredCache
from tlinformer_jax.decoding.context_parallel import context_mesh, split_of
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.interop import params_from_reference, params_to_reference
from tlinformer_jax.models import delta
from tlinformer_jax.models.layers import prepare_layers
from tlinformer_jax.parallel.sharding import build_mesh, tree_shardings
from tlinformer_jax.training.setup import check_sequences_divide

TOLERANCE = 1e-5
CONFIG = dataclasses.replace(SMALL, architecture="gated_deltanet")
BATCH, HEADS, WIDTH = 2, 2, 8


def inputs(length: int, seed: int = 0, alike: bool = False) -> list[np.ndarray]:
    """q, k of length 1, v, g, beta, and a state, float64; `alike` keys that overwrite each other and never fade."""
    rng = np.random.default_rng(seed)
    q, k, v = rng.standard_normal((3, BATCH, length, HEADS, WIDTH))
    k = 1 + 0.1 * k if alike else k
    q, k = (part / np.linalg.norm(part, axis=-1, keepdims=True) for part in (q, k))
    # From heads that keep all to heads that keep e^-3 of what they had.
    g = np.zeros((BATCH, length, HEADS)) if alike else -np.exp(rng.uniform(-6, 1, (BATCH, length, HEADS)))
    beta = np.ones_like(g) if alike else rng.uniform(0, 1, g.shape)
    return [q, k, v, g, beta, rng.standard_normal((BATCH, HEADS, WIDTH, WIDTH))]


def by_steps(q, k, v, g, beta, state):
    """`delta_step`, row after row."""
    rows = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), (q, k, v, g, beta))
    state, outputs = jax.lax.scan(lambda state, row: delta.delta_step(state, *row), state, rows)
    return jnp.moveaxis(outputs, 0, 1), state


def by_numpy(q, k, v, g, beta, state):
    found = [reference.delta_rule(*row) for row in zip(q, k, v, g, beta, state)]
    return tuple(np.stack(part) for part in zip(*found))


def with_gradients(function):
    """A jitted function of outputs, the last state, and the gradients of all inputs of a random sum of them."""

    def total(*arrays):
        output, state = function(*arrays)
        rng = np.random.default_rng(1)
        return jnp.sum(output * rng.standard_normal(output.shape)) + jnp.sum(state * rng.standard_normal(state.shape))

    gradient = jax.grad(total, argnums=tuple(range(6)))
    return jax.jit(lambda *arrays: (*function(*arrays), *gradient(*arrays)))


STEPS = with_gradients(by_steps)


@functools.cache
def truth(length: int, alike: bool) -> list[np.ndarray]:
    """The same of the step form in float64, whose values are those of NumPy."""
    arrays = inputs(length, alike=alike)
    with jax.enable_x64(True):
        found = [np.asarray(part) for part in STEPS(*map(jnp.asarray, arrays))]
    for value, expected in zip(found, by_numpy(*arrays)):
        np.testing.assert_allclose(value, expected, atol=1e-12)
    return found


def largest_difference(program, length: int, alike: bool = False) -> float:
    """The largest error of a value or a gradient of `with_gradients`, as a share of the largest of its array."""
    arrays = [jnp.asarray(part, jnp.float32) for part in inputs(length, alike=alike)]
    found, expected = program(*arrays), truth(length, alike)
    return max(float(np.abs(a - b).max() / max(1, np.abs(b).max())) for a, b in zip(found, expected, strict=True))


# Of each size of chunk: sequences that are shorter, as long, a row longer, and of several chunks.
QUICK = [(5, 64), (65, 16), (131, 64)]
SLOW = [*((n, 16) for n in (1, 2, 16, 17, 200, 4096)), *((n, 32) for n in (17, 63, 64, 513))]
SLOW += [*((n, 64) for n in (63, 64, 65, 1000)), *((n, 128) for n in (65, 127, 128, 129, 513))]
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.parametrize(("length", "chunk"), CASES)
def test_chunks_equal_steps_and_numpy(length, chunk):
    chunked = with_gradients(functools.partial(delta.delta_chunked, chunk=chunk))
    assert largest_difference(chunked, length) < TOLERANCE
    assert largest_difference(chunked, length, alike=True) < TOLERANCE
    assert length > 200 or largest_difference(STEPS, length) < TOLERANCE


def test_a_chunk_does_not_overflow_where_a_head_forgets_at_once():
    """Sums of decays below -1000, whose exponentials the wrong way round are infinite."""
    q, k, v, g, beta, state = inputs(100)
    arrays = q, k, v, 60 * g - 20, beta, state
    found = with_gradients(delta.delta_chunked)(*(jnp.asarray(part, jnp.float32) for part in arrays))
    assert all(bool(jnp.isfinite(part).all()) for part in found)
    for value, expected in zip(found, by_numpy(*arrays)):
        np.testing.assert_allclose(value, expected, atol=TOLERANCE)


def without_decay(monkeypatch):
    """A chunk's rows do not fade while they are in it."""
    real = delta._chunked
    monkeypatch.setattr(delta, "_chunked", lambda q, k, v, g, *rest: real(q, k, v, jnp.zeros_like(g), *rest))


def writing_all(monkeypatch):
    """beta = 1: what a key had is replaced, not moved towards the new value."""
    real = delta._chunked
    monkeypatch.setattr(delta, "_chunked", lambda q, k, v, g, b, s: real(q, k, v, g, jnp.ones_like(b), s))


def forgetting_between_chunks(monkeypatch):
    """Each chunk begins with the sequence's first state."""

    def scan(function, state, items):
        found = [function(state, jax.tree.map(lambda array, n=n: array[n], items)) for n in range(len(items[0]))]
        return found[-1][0], jax.tree.map(lambda *parts: jnp.stack(parts), *(outputs for _, outputs in found))

    monkeypatch.setattr(delta.jax.lax, "scan", scan)


def inverse_to_first_order(monkeypatch):
    """(I + T)^-1 = I - T: a row corrects what the rows before wrote, but not what these corrected."""
    monkeypatch.setattr(delta, "unit_lower_inverse", lambda lower: jnp.eye(lower.shape[-1]) - lower)


@pytest.mark.parametrize(
    "mutate",
    [without_decay, writing_all, forgetting_between_chunks, inverse_to_first_order],
    ids=lambda mutate: mutate.__name__,
)
def test_mutations_of_the_rule_are_caught(mutate, monkeypatch, own_traces):
    arrays = inputs(40)
    expected, _ = by_numpy(*arrays)
    mutate(monkeypatch)
    chunked = jax.jit(functools.partial(delta.delta_chunked, chunk=16))
    output, _ = chunked(*(jnp.asarray(part, jnp.float32) for part in arrays))
    assert np.abs(output - expected).max() > 1000 * TOLERANCE


@pytest.mark.parametrize("size", [1, 2, 4, 16, 32, 64, 128])
def test_the_inverse_of_equal_keys(size):
    """I + a triangle of ones, where a series of powers would lose every digit."""
    lower = jnp.tril(jnp.ones((3, size, size)), -1)
    expected = np.eye(size) - np.eye(size, k=-1)
    np.testing.assert_allclose(jax.jit(delta.unit_lower_inverse)(lower), np.stack([expected] * 3), atol=1e-6)


# ---- The model


HYBRID = "gated_deltanet_hybrid"


@pytest.mark.parametrize(
    ("architecture", "length", "plan"),
    [
        *((name, 70, ExecutionPlan(scan_layers=True)) for name in RECURRENT),
        pytest.param(HYBRID, 70, ExecutionPlan(scan_layers=False, checkpointing=True), marks=pytest.mark.slow),
        pytest.param(HYBRID, 1, ExecutionPlan(), marks=pytest.mark.slow),
        pytest.param(RECURRENT[0], 300, ExecutionPlan(scan_layers=True, checkpointing=True), marks=pytest.mark.slow),
    ],
)
def test_logits_equal_numpys(architecture, length, plan):
    """Of six layers: of the hybrid four that are scanned, one of them of attention, and two that are left."""
    config = dataclasses.replace(CONFIG, architecture=architecture, memory=plan)
    weights = golden.random_weights(config)
    tokens = np.random.default_rng(length).integers(0, config.vocab_size, (2, length))
    logits = jax.jit(build_model(config).apply)(params_from_reference(weights, config), tokens)
    expected = reference.logits(weights, config, tokens)
    assert expected.std() > 0.5
    np.testing.assert_allclose(logits, expected, atol=5e-5)


def test_which_layers_attend():
    def attends(architecture, layers):
        config = dataclasses.replace(SMALL, architecture=architecture, num_blocks=1, hidden_depth=layers - 2)
        return [number for number in range(layers) if config.attends(number)]

    assert attends("gated_deltanet", 9) == []
    assert attends("gated_deltanet_hybrid", 9) == [3, 7]
    assert attends("gated_deltanet_hybrid", 3) == [2]
    assert attends("transformer", 3) == [0, 1, 2]


@pytest.mark.parametrize("width", [64, 128, 256, 432, 512, 640, 768, 1024, 2048])
def test_a_layer_has_the_parameters_of_a_standard_layer(width):
    """As declared, and to 0.1%; heads of 128 features, or 64, where there are two of them."""
    standard = ModelConfig(d_model=width, num_heads=4, num_blocks=1, hidden_depth=0, architecture="transformer")
    config = dataclasses.replace(standard, architecture="gated_deltanet")

    def count(config):
        tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        shapes = jax.eval_shape(build_model(config).init, jax.random.key(0), tokens)["params"]["layers_0"]
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    assert abs(count(config) / count(standard) - 1) < 1e-3
    assert config.delta.width == (128 if width >= 256 else 64 if width >= 128 else width // 4)
    assert config.delta.inner >= width > config.delta.inner - config.delta.width


def test_the_41m_shape():
    assert dataclasses.astuple(delta_shape(432, 36, 1280)) == (4, 128, 996)
    with pytest.raises(ConfigError, match=r"model\.d_ff = 8: must be at least 11 for architecture 'gated_deltanet'"):
        dataclasses.replace(CONFIG, d_ff=8)
    assert dataclasses.replace(CONFIG, d_ff=11).delta.feed_forward >= 1


@pytest.mark.parametrize("architecture", RECURRENT)
def test_it_has_no_history_to_split(architecture):
    config = dataclasses.replace(CONFIG, architecture=architecture)
    for axis in ("window", "context"):
        with pytest.raises(
            ConfigError, match=rf"train\.mesh = '{axis}=2': {axis} must be 1 for model.architecture = '{architecture}'"
        ):
            check_sequences_divide(build_mesh({axis: 2}), config, 16, 0)
    with pytest.raises(ConfigError, match=r"generation\.context = 2: must be 1"):
        split_of(context_mesh(2), config)


@pytest.mark.parametrize("architecture", RECURRENT)
def test_files_hold_every_parameter(architecture):
    """Under names and shapes as PyTorch has them, there and back."""
    config = dataclasses.replace(CONFIG, architecture=architecture)
    weights = golden.random_weights(config)
    found = params_to_reference(params_from_reference(weights, config), config)
    assert set(found) == set(weights)
    for name, array in weights.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert found["transformer.transformer_layers.0.conv.weight"].shape == (3 * 16, 4)


def test_padded_features_change_nothing():
    """In half precision the feed-forward is padded to a multiple of 8 features."""
    model = build_model(CONFIG)
    params = model.apply(params_from_reference(golden.random_weights(CONFIG), CONFIG), method=model.parameters)
    (layer,) = prepare_layers(params.layers[:1], jnp.bfloat16)
    assert CONFIG.delta.feed_forward % 8
    assert layer.gate_up_kernel.shape[-1] == layer.down_kernel.shape[0] == -(-CONFIG.delta.feed_forward // 8) * 8
    assert not layer.down_kernel[CONFIG.delta.feed_forward :].any()


@pytest.mark.slow
def test_half_precision_is_near():
    config = ModelConfig(architecture=HYBRID, vocab_size=97, d_model=256, num_heads=4, num_blocks=1, dtype="float32")
    tokens = np.random.default_rng(0).integers(0, 97, (1, 130))
    variables = jax.jit(build_model(config).init)(jax.random.key(0), tokens)
    half = jax.jit(build_model(dataclasses.replace(config, dtype="bfloat16")).apply)(variables, tokens)
    whole = jax.jit(build_model(config).apply)(variables, tokens)
    assert jnp.linalg.norm(half - whole) < 0.05 * jnp.linalg.norm(whole)


@pytest.mark.parametrize("architecture", [RECURRENT[0], pytest.param(RECURRENT[1], marks=pytest.mark.slow)])
def test_eight_devices_equal_one(architecture):
    """Loss and gradients; heads are split over `tensor`."""
    config = dataclasses.replace(CONFIG, architecture=architecture, num_blocks=2, hidden_depth=0, d_ff=28)
    model, variables = build_model(config), params_from_reference(golden.random_weights(config), config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (8, 40))

    def loss(variables, tokens):
        logits = model.apply(variables, tokens)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1))

    expected, gradients = jax.jit(jax.value_and_grad(loss))(variables, tokens)
    mesh = build_mesh({"fsdp": 2, "tensor": 2})
    shardings = tree_shardings(variables, mesh)
    with jax.set_mesh(mesh):
        spread = jax.device_put(variables, shardings)
        batch = jax.device_put(tokens, jax.sharding.NamedSharding(mesh, jax.P(("data", "fsdp"))))
        value, found = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))(spread, batch)
    kernel = found["params"]["layers_0"]["qkvg_kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    assert abs(float(value - expected)) < 1e-5
    for ours, one in zip(jax.tree.leaves(found), jax.tree.leaves(gradients), strict=True):
        assert np.linalg.norm(ours - one) <= 1e-4 * np.linalg.norm(one)


@pytest.mark.slow
def test_an_update_of_eight_devices_equals_one(monkeypatch):
    """The package's own step, where axes that hold copies of the parameters are manual; gradients by Adam's moments."""
    monkeypatch.setattr(test_training, "MODEL", dataclasses.replace(test_training.MODEL, architecture="gated_deltanet"))
    many, metrics, _ = test_training.after_one_update(build_mesh({"fsdp": 4, "tensor": 2}))
    one, expected, _ = test_training.after_one_update(build_mesh({}, jax.devices()[:1]))
    assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), abs=1e-5)
    for ours, true in zip(jax.tree.leaves(many.opt_state), jax.tree.leaves(one.opt_state), strict=True):
        assert np.linalg.norm(ours - np.asarray(true)) <= 1e-4 * np.linalg.norm(true)


# ---- Decoding


@pytest.mark.parametrize("architecture", RECURRENT)
def test_decoding_equals_the_reference(architecture, monkeypatch, own_traces):
    """Unequal prompts, some shorter than the convolution; the long one in chunks of four rows, the cache growing."""
    monkeypatch.setattr(cache_module, "SMALLEST_CLASS", 16)
    monkeypatch.setattr(cache_module, "CHUNK_ROWS", 4)
    config = dataclasses.replace(CONFIG, architecture=architecture, hidden_depth=0)
    decoder = make_decoder(config)
    assert largest_error(decoder, [1, 2, 3, 4, 17], 28, room=17) < 2e-5
    one, many = (decoder.init_cache(1, tokens) for tokens in (10, 10_000))
    grows = architecture == "gated_deltanet_hybrid"
    assert (
        sum(leaf.nbytes for leaf in jax.tree.leaves(one)) < sum(leaf.nbytes for leaf in jax.tree.leaves(many))
    ) == grows


def stale_inputs(monkeypatch):
    """The convolution's last rows are not carried from token to token."""
    real = LayeredCache.with_states

    def mutated(cache, states, active):
        states = [dataclasses.replace(state, inputs=jnp.zeros_like(state.inputs)) for state in states]
        return real(cache, states, active)

    monkeypatch.setattr(LayeredCache, "with_states", mutated)


def stale_state(monkeypatch):
    """A token does not write."""
    real = LayeredCache.with_states

    def mutated(cache, states, active):
        after = real(cache, states, active)
        return dataclasses.replace(after, state=dataclasses.replace(after.state, state=cache.state.state))

    monkeypatch.setattr(LayeredCache, "with_states", mutated)


def padding_read(monkeypatch):
    """The rows that pad a prompt are written into the state."""
    real = layered.delta_mixer
    monkeypatch.setattr(layered, "delta_mixer", lambda layer, x, state, length: real(layer, x, state))


@pytest.mark.parametrize("mutate", [stale_inputs, stale_state, padding_read], ids=lambda mutate: mutate.__name__)
def test_mutations_of_decoding_are_caught(mutate, monkeypatch, own_traces):
    mutate(monkeypatch)
    config = dataclasses.replace(CONFIG, num_blocks=1, hidden_depth=0)
    error, _ = compared(make_decoder(config), [3, 8, 9], 14)
    assert error > 100 * TOLERANCE


def test_a_sequence_that_waits_is_not_changed():
    decoder = make_decoder(dataclasses.replace(CONFIG, num_blocks=1, hidden_depth=0))
    cache = decoder.init_cache(2, 8)
    for row in range(2):
        cache, _ = decoder.prefill(cache, row, np.arange(5))
    before = jax.tree.map(np.asarray, cache.state)
    cache, _ = decoder.step(cache, np.array([7, 9], np.int32), np.array([True, False]))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(cache.state)):
        np.testing.assert_array_equal(new[:, 1], old[:, 1])
        assert (new[:, 0] != old[:, 0]).any()
    np.testing.assert_array_equal(cache.position, [6, 5])

"""The library against the published models' golden values, and against the independent reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import golden, reference
from tlinformer_jax import ModelConfig, build_model
from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.interop import params_from_reference, params_to_reference
from tlinformer_jax.models import block, history, tlinformer

needs_golden = pytest.mark.skipif(not golden.available(), reason=f"no golden files in {golden.FOLDER}")
LOGITS_TOLERANCE = 2e-5 if jax.default_backend() == "cpu" else 5e-5
GRADIENT_TOLERANCE = 1e-4


def loss_and_logits(variables, config: ModelConfig, inputs, labels):
    """Mean cross-entropy and logits by the plainest way there is; the chunked loss is tested against this."""
    logits = build_model(config).apply(variables, inputs)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_probs, labels[..., None], -1).mean(), logits


def evaluate(config: ModelConfig, weights, inputs, labels):
    """(loss, logits, gradients under the published names)."""
    variables = params_from_reference(weights, config)
    step = jax.jit(jax.value_and_grad(loss_and_logits, has_aux=True), static_argnums=1)
    (loss, logits), gradients = step(variables, config, jnp.asarray(inputs), jnp.asarray(labels))
    return float(loss), np.asarray(logits), params_to_reference(gradients, config)


def relative_error(value: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(value - truth) / np.linalg.norm(truth))


@needs_golden
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "tlin_asym" else ()) for name in golden.NAMES]
)
def test_golden(name):
    truth = golden.load(name)
    loss, logits, gradients = evaluate(truth.config, truth.params, truth.inputs, truth.labels)
    np.testing.assert_allclose(logits, truth.logits, atol=LOGITS_TOLERANCE, rtol=0)
    assert abs(loss - truth.loss) < 1e-5
    errors = {key: relative_error(gradients[key], value) for key, value in truth.gradients.items()}
    assert set(errors) == set(gradients) - {"transformer.lm_head.weight"}
    assert max(errors.values()) < GRADIENT_TOLERANCE, max(errors, key=errors.get)


@needs_golden
@pytest.mark.parametrize("name", golden.NAMES)
def test_reference_implementation_reproduces_golden(name):
    truth = golden.load(name)
    logits = reference.logits(truth.params, truth.config, truth.inputs)
    np.testing.assert_allclose(logits, truth.logits, atol=3e-6, rtol=0)
    assert abs(reference.mean_loss(logits, truth.labels) - truth.loss) < 1e-6


# hidden_depth, history_window, generation_window, length, architecture, segments (each is compiled by itself)
SHAPES = [
    (0, 3, 5, 23, "tlinformer", 1),
    (1, 9, 4, 31, "tlinformer", 2),
    (2, 4, 4, 21, "tlinformer", 1),
    (3, 5, 7, 29, "tlinformer", 1),
    (1, "auto", 6, 67, "tlinformer", 2),
    (0, "auto", 1, 9, "tlinformer", 3),
    (1, 50, 4, 19, "tlinformer", 1),
    (2, 6, 8, 5, "tlinformer", 4),
    (1, 3, 5, 1, "tlinformer", 4),
    (1, 5, 4, 22, "tconstformer", 1),
    (0, "auto", 8, 41, "tconstformer", 1),
    (1, 5, 4, 22, "transformer", 1),
    (0, 5, 4, 22, "sliding_window", 1),
]


def shape_config(hidden_depth, history_window, generation_window, architecture, segments) -> ModelConfig:
    return ModelConfig(
        architecture=architecture,
        vocab_size=41,
        d_model=24,
        num_heads=2,
        num_blocks=2,
        hidden_depth=hidden_depth,
        d_ff=40,
        history_window=history_window,
        generation_window=generation_window,
        dtype="float32",
        memory=ExecutionPlan(segments),
    )


def check_against_reference(hidden_depth, history_window, generation_window, length, architecture, segments):
    config = shape_config(hidden_depth, history_window, generation_window, architecture, segments)
    weights = golden.random_weights(config, seed=length)
    tokens = np.random.default_rng(length).integers(0, config.vocab_size, (2, length))
    # A function of its own, so that a mutation is never served from an earlier trace.
    apply = jax.jit(lambda variables, tokens: build_model(config).apply(variables, tokens))
    logits = np.asarray(apply(params_from_reference(weights, config), jnp.asarray(tokens)))
    truth = reference.logits(weights, config, tokens)
    assert truth.std() > 0.5, "the weights must be large enough for the comparison to mean something"
    np.testing.assert_allclose(logits, truth, atol=LOGITS_TOLERANCE, rtol=0)


# Nearly what the golden files and other shapes have.
SLOW = [(2, 4, 4, 21, "tlinformer", 1), (1, 5, 4, 22, "tconstformer", 1)]


@pytest.mark.parametrize(
    "shape",
    [pytest.param(shape, marks=pytest.mark.slow if shape in SLOW else ()) for shape in SHAPES],
    ids=lambda shape: "-".join(map(str, shape)),
)
def test_random_shapes_equal_reference(shape):
    check_against_reference(*shape)


def drop_history(monkeypatch):
    """x and z no longer see the history, nor each other."""
    real = block.attend

    def without(query, key, value, *, scores, **options):
        attended = real(query, key, value, scores, **options)
        return attended if scores.causal else jnp.zeros_like(attended)

    for module in (block, history):
        monkeypatch.setattr(module, "attend", without)


def skip_restore(monkeypatch):
    """The next block reads the history it had before."""
    monkeypatch.setattr(history, "restore_rows", lambda config, never_empty, C, *rest: C)


def shift_observed_positions(monkeypatch):
    """z is rotated as if it began at position 0."""
    real = tlinformer.place_window

    def mutated(frame, rope, rows):
        first = rope.rows(0, frame.observed_width)
        window = real(frame, rope, rows)
        rope = jax.tree.map(lambda z, x: jnp.concatenate([z, x], axis=-2), first, window.x_rope)
        return dataclasses.replace(window, z_rope=first, rope=rope)

    monkeypatch.setattr(tlinformer, "place_window", mutated)


def read_future_rows(monkeypatch):
    """Rows past the history's end are attended to."""
    for module in (block, history):
        real = module.attend
        monkeypatch.setattr(module, "attend", lambda *args, key_length=None, real=real, **rest: real(*args, **rest))


@pytest.mark.parametrize("mutate", [drop_history, skip_restore, shift_observed_positions, read_future_rows])
def test_mutations_are_caught(mutate, monkeypatch, request):
    """Each fault in the model must make a comparison above fail."""
    mutate(monkeypatch)
    request.addfinalizer(jax.clear_caches)
    jax.clear_caches()  # jax.checkpoint remembers traces of module-level functions
    if golden.available():
        truth = golden.load("tlin_small")
        variables = params_from_reference(truth.params, truth.config)
        apply = jax.jit(lambda variables: build_model(truth.config).apply(variables, truth.inputs))
        assert np.abs(np.asarray(apply(variables)) - truth.logits).max() > 100 * LOGITS_TOLERANCE
    else:
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            check_against_reference(2, 6, 8, 44, "tlinformer", 1)


def test_reference_round_trip_is_exact():
    config = shape_config(1, 4, 4, "tlinformer", 1)
    weights = golden.random_weights(config)
    again = params_to_reference(params_from_reference(weights, config), config)
    assert set(again) == set(weights)
    for name, array in weights.items():
        np.testing.assert_array_equal(again[name], array)


def test_reference_faults_are_listed_together():
    config = shape_config(1, 4, 4, "tlinformer", 1)
    weights = golden.random_weights(config)
    del weights["transformer.norm.bias"]
    weights["surplus"] = np.zeros(3)
    weights["embedding.weight"] = np.zeros((2, 3))
    with pytest.raises(ValueError, match="3 faults") as caught:
        params_from_reference(weights, config)
    for part in ("missing transformer.norm.bias", "unknown surplus", "embedding.weight has shape [2, 3]"):
        assert part in str(caught.value)


def test_untied_head_is_refused():
    config = shape_config(1, 4, 4, "tlinformer", 1)
    weights = golden.random_weights(config)
    weights["transformer.lm_head.weight"] = weights["embedding.weight"] + 1
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        params_from_reference(weights, dataclasses.replace(config))

"""What the model promises beyond equality with the reference: causality, awareness, size, numerics."""

import dataclasses
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import golden, reference
from tlinformer_jax import DualWindowBlock, ModelConfig, build_model
from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.config.model import ARCHITECTURES, RECURRENT
from tlinformer_jax.errors import DataError
from tlinformer_jax.interop import params_from_reference
from tlinformer_jax.kernels.common import Scores
from tlinformer_jax.models.attention import attend, attend_with_lse
from tlinformer_jax.models.layers import Dropout, Embedded, prepare_layers
from tlinformer_jax.models.rope import rotary_angles
from tlinformer_jax.models.tlinformer import forward_windows
from tlinformer_jax.models.windows import num_windows, plan_segments

SMALL = ModelConfig(
    vocab_size=31,
    d_model=16,
    num_heads=2,
    num_blocks=2,
    hidden_depth=1,
    d_ff=24,
    history_window=3,
    generation_window=4,
    dtype="float32",
    memory=ExecutionPlan(segments=2),
)

IDS = jnp.zeros((2, 9), jnp.int32)


def golden_scale(config: ModelConfig):
    return params_from_reference(golden.random_weights(config), config)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameter_count_of_the_41m_shape(architecture):
    model = build_model(ModelConfig(architecture=architecture))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    if architecture in RECURRENT:  # by the feed-forward's width
        assert abs(count / 40_982_544 - 1) < 1e-3
    else:
        assert count == 40_982_544


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_causality_and_full_awareness_by_gradients(architecture):
    """d logits[t] / d embedding[s] is exactly 0 for s > t, and non-zero for every s <= t that t may see."""
    config = dataclasses.replace(SMALL, architecture=architecture, history_window=4, memory=ExecutionPlan())
    model, variables = build_model(config), golden_scale(config)
    length = 22  # five full windows and a short one
    embeddings = jnp.asarray(np.random.default_rng(0).standard_normal((1, length, config.d_model)), jnp.float32)
    mixing = jnp.asarray(np.random.default_rng(1).standard_normal(config.vocab_size), jnp.float32)

    @jax.jit
    def influence(position):
        def output(inputs):
            return model.apply(variables, inputs_embeds=inputs)[0, position] @ mixing

        return jnp.abs(jax.grad(output)(embeddings))[0].max(-1)

    for position in (0, 2, 3, 4, 9, 11, 12, 20, 21):
        gradient = np.asarray(influence(position))
        assert (gradient[position + 1 :] == 0).all()
        seen = gradient[: position + 1]
        if architecture == "sliding_window":  # six layers of eight positions reach everything here
            assert seen[-8:].min() > 0
        else:
            assert seen.min() > 1e-7, (position, seen)


@pytest.mark.slow
def test_scan_equals_plain_loop_over_windows():
    """The segmented scans give what applying the public block window by window gives, gradients included: by ordinary
    differentiation. As training has them: tests/test_training_paths.py."""
    config = dataclasses.replace(SMALL, memory=ExecutionPlan(checkpointing=True), hidden_depth=0)
    variables = golden_scale(config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, 11)))
    model, block = build_model(config), DualWindowBlock(config)
    targets = jnp.asarray(np.random.default_rng(1).standard_normal((2, 11, config.d_model)), jnp.float32)

    def scanned(params):
        embeddings = params["embedding"][tokens]
        typed = model.apply({"params": params}, method=model.parameters)
        return forward_windows(prepare_layers(typed.blocks, jnp.float32), config, Embedded(embeddings))

    def looped(params):
        embeddings, outputs = params["embedding"][tokens], []
        for start in range(0, 11, config.generation_window):
            x, history = embeddings[:, start : start + config.generation_window], embeddings[:, :start]
            for index in range(config.num_blocks):
                x, history = block.apply({"params": params[f"blocks_{index}"]}, x, history)
            outputs.append(x)
        return jnp.concatenate(outputs, axis=1)

    def outcome(function):
        return jax.jit(jax.value_and_grad(lambda params: jnp.mean((function(params) - targets) ** 2)))

    (loss, grads), (true_loss, true_grads) = (outcome(f)(variables["params"]) for f in (scanned, looped))
    assert abs(float(loss - true_loss)) < 1e-5
    for value, truth in zip(jax.tree.leaves(grads), jax.tree.leaves(true_grads), strict=True):
        norm = float(jnp.linalg.norm(truth))
        assert float(jnp.linalg.norm(value - truth)) <= 1e-4 * norm + 1e-12


@pytest.mark.parametrize("segments", [2])
def test_results_do_not_depend_on_segments_or_layer_scans(segments):
    variables = golden_scale(SMALL)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, SMALL.vocab_size, (1, 27)))
    truth = reference.logits(golden.random_weights(SMALL), SMALL, np.asarray(tokens))
    for scan_layers in (True, False):
        config = dataclasses.replace(SMALL, memory=ExecutionPlan(segments, scan_layers=scan_layers))
        logits = jax.jit(build_model(config).apply)(variables, tokens)
        np.testing.assert_allclose(logits, truth, atol=2e-5)


def test_segments_cover_every_window_once():
    for windows in (1, 2, 3, 7, 64):
        for segments in (1, 3, 4, 9):
            runs = plan_segments(SMALL, windows, ExecutionPlan(segments))
            covered = [segment.first + i for segment in runs for i in range(segment.count)]
            assert covered == list(range(1, windows))
            assert all(segment.history_rows >= covered[-1] * 4 for segment in runs[-1:])
            for first in (0, 2, 5, 63):
                later = plan_segments(SMALL, windows, ExecutionPlan(segments), first=first)
                covered = [segment.first + i for segment in later for i in range(segment.count)]
                assert covered == list(range(max(first, 1), windows))
    paired = dataclasses.replace(SMALL, history_window=3)
    for windows in (3, 4, 7, 8, 32):
        (pairs,) = plan_segments(paired, windows, ExecutionPlan(paired=True))
        assert sorted(pairs.windows.flat) == list(range(windows % 2, windows))
        assert {int(sum(pair)) * 4 for pair in pairs.windows} == {pairs.history_rows}, "no row is masked"
        assert all(first > second for first, second in pairs.windows)
    assert num_windows(SMALL, 1) == 1
    assert num_windows(SMALL, 9) == 3


def test_dropout_acts_in_training_only_and_is_the_same_under_checkpointing():
    config = dataclasses.replace(SMALL, hidden_depth=0, memory=ExecutionPlan())
    variables = golden_scale(config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, SMALL.vocab_size, (1, 11)))

    def run(train, **fields):
        model = build_model(dataclasses.replace(config, **fields))
        return jax.jit(lambda: model.apply(variables, tokens, train=train, rngs={"dropout": jax.random.key(3)}))()

    kept, recomputed = (run(True, dropout=0.3, memory=ExecutionPlan(checkpointing=again)) for again in (False, True))
    plain = run(False, dropout=0.3)
    np.testing.assert_allclose(kept, recomputed, atol=2e-5)
    assert jnp.abs(kept - plain).max() > 0.1
    truth = reference.logits(golden.random_weights(config), config, np.asarray(tokens))
    np.testing.assert_allclose(plain, truth, atol=2e-5)


def test_dropout_keeps_the_mean_and_is_independent_between_softmaxes():
    values = Dropout.by_key(jax.random.key(0), 0.25)(jnp.ones(200_000))
    assert abs(float(values.mean()) - 1) < 0.01
    assert abs(float((values == 0).mean()) - 0.25) < 0.01
    other = Dropout.by_key(jax.random.key(0), 0.25).fold_in(1)(jnp.ones(200_000))
    assert abs(float(jnp.corrcoef(values, other)[0, 1])) < 0.01


@pytest.mark.parametrize("position", [0, 1, 1023, 10**6, 2**24 + 1, 2**31 - 1])
def test_rotary_angles_are_exact_at_every_position(position):
    for head_dim in (36, 64, 128):
        angles = np.asarray(jax.jit(rotary_angles, static_argnums=1)(jnp.int32(position), head_dim), np.float64)
        truth = np.longdouble(position) * np.longdouble(10000) ** (-2 * np.arange(head_dim // 2) / head_dim)
        difference = np.remainder((angles - truth).astype(np.float64) + np.pi, 2 * np.pi) - np.pi
        assert np.abs(difference).max() < 1e-6


@pytest.mark.skipif(not golden.available(), reason=f"no golden files in {golden.FOLDER}")
@pytest.mark.parametrize("name", ["base_small", "tconst_small", "tlin_asym"])
def test_bfloat16_compute_at_golden_scale(name):
    truth = golden.load(name, dtype="bfloat16")
    variables = params_from_reference(truth.params, truth.config)
    logits = np.asarray(jax.jit(build_model(truth.config).apply)(variables, jnp.asarray(truth.inputs)), np.float64)
    loss = reference.mean_loss(logits, truth.labels)
    assert abs(loss - truth.loss) < 0.01 * truth.loss
    assert np.sqrt(np.mean((logits - truth.logits) ** 2)) < 0.02 * np.sqrt(np.mean(truth.logits**2))


def count_equations(jaxpr) -> int:
    """Equations of a jaxpr and of every jaxpr inside it."""
    total = len(jaxpr.eqns)
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for part in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    total += count_equations(inner)
    return total


@pytest.mark.parametrize("architecture", ["tlinformer", "tconstformer"])
def test_program_size_does_not_grow_with_the_number_of_windows(architecture):
    config = dataclasses.replace(SMALL, architecture=architecture, memory=ExecutionPlan(4), hidden_depth=0)
    model, variables = build_model(config), golden_scale(config)

    def size(windows):
        tokens = jnp.zeros((1, windows * config.generation_window), jnp.int32)
        return count_equations(jax.make_jaxpr(model.apply)(variables, tokens).jaxpr)

    assert size(64) <= 1.1 * size(16)
    assert size(16) > 300  # the count does reach into the scans


def saved_values(config: ModelConfig, length: int) -> list:
    """Shapes and dtypes of what the model's forward pass keeps for its backward pass."""
    model = build_model(config)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]

    def pullback(params):
        def hidden(params):
            return model.apply(
                {"params": params}, jnp.zeros((1, length), jnp.int32), train=False, method=model.hidden_states
            )

        return jax.vjp(hidden, params)[1]

    return jax.tree.leaves(jax.eval_shape(pullback, params))


def test_no_wide_float32_value_is_kept_for_the_backward_pass():
    """LayerNorm, rotation and gate are done again from bfloat16, so they keep nothing of their own."""
    config = dataclasses.replace(SMALL, architecture="transformer", dtype="bfloat16", d_ff=40)
    kept = [leaf for leaf in saved_values(config, 50) if 50 in leaf.shape]
    assert kept
    wide = [leaf for leaf in kept if leaf.dtype == jnp.float32 and leaf.shape[-1] in (16, 40)]
    assert not wide, wide


@pytest.mark.parametrize("architecture", ["tlinformer", "transformer"])
def test_checkpointing_keeps_no_inner_values(architecture):
    """The feed-forward's inner products have a width of 2 x 40."""
    config, size = dataclasses.replace(SMALL, architecture=architecture, d_ff=40, hidden_depth=0), []
    for again in (False, True):
        plan = ExecutionPlan(2, scan_layers=False, checkpointing=again)
        leaves = saved_values(dataclasses.replace(config, memory=plan), 12)
        size.append(sum(leaf.size for leaf in leaves))
        # The kernel that makes them is [D, 2, 40], too.
        assert any(leaf.shape[1:] == (2, 40) for leaf in leaves if leaf.shape[:1] != (config.d_model,)) != again
    assert size[1] < size[0]


@pytest.mark.slow
def test_checkpointing_changes_no_gradient():
    """Of a baseline; of windows: tests/test_training_paths.py."""
    config = dataclasses.replace(SMALL, architecture="transformer", hidden_depth=0)
    params = golden_scale(config)["params"]
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, SMALL.vocab_size, (1, 11)))

    def gradient(config):
        model = build_model(config)
        return jax.jit(jax.grad(lambda params: (model.apply({"params": params}, tokens) ** 2).mean()))(params)

    again = gradient(dataclasses.replace(config, memory=ExecutionPlan(checkpointing=True)))
    for value, truth in zip(jax.tree.leaves(again), jax.tree.leaves(gradient(config)), strict=True):
        assert jnp.linalg.norm(value - truth) <= 1e-5 * jnp.linalg.norm(truth)


@pytest.mark.slow
def test_compile_time_does_not_grow_with_the_number_of_windows():
    """At 64 windows at most 1.5 times that at 16; least processor time of three, as others share the machine."""
    config = dataclasses.replace(SMALL, hidden_depth=0, memory=ExecutionPlan(4))
    model, variables = build_model(config), golden_scale(config)

    def seconds(windows):
        tokens = jnp.zeros((1, windows * config.generation_window), jnp.int32)
        times = []
        for _ in range(3):
            unique = time.time()  # a constant of its own keeps the program out of the persistent cache
            fresh = jax.jit(lambda variables, tokens, unique=unique: model.apply(variables, tokens) + unique)
            lowered = fresh.lower(variables, tokens)
            started = time.process_time()
            lowered.compile()
            times.append(time.process_time() - started)
        return min(times)

    short, long = seconds(16), seconds(64)
    print(f"compilation {short:.2f} s at 16 windows, {long:.2f} s at 64")
    assert long <= 1.5 * short, (short, long)


def test_attention_dropout_is_never_dropped_silently():
    x = jnp.ones((1, 2, 1, 8))
    with pytest.raises(ValueError, match="'cudnn' does not support dropout"):
        attend(x, x, x, Scores(1.0), dropout=Dropout.by_key(jax.random.key(0), 0.5), backend="cudnn")


def test_an_unknown_attention_backend_is_named_with_those_that_exist():
    x = jnp.ones((1, 2, 1, 8))
    with pytest.raises(ValueError, match="backend 'flash' must be one of auto, deterministic, xla, cudnn, splash, tri"):
        attend(x, x, x, Scores(1.0), backend="flash")


def test_attention_log_sum_exp_merges_partial_attentions():
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((2, n, 3, 8)), jnp.float32) for n in (5, 11, 11))
    scores = Scores(8**-0.5)
    whole, lse = attend_with_lse(query, key, value, scores)
    parts = [attend_with_lse(query, key[:, s], value[:, s], scores) for s in (slice(0, 4), slice(4, 11))]
    total = jnp.logaddexp(parts[0][1], parts[1][1])
    merged = sum(output * jnp.exp(part - total)[..., None] for output, part in parts)
    np.testing.assert_allclose(merged, whole, atol=1e-6)
    np.testing.assert_allclose(total, lse, atol=1e-6)


def test_attention_over_no_keys_is_zero_with_finite_gradients():
    x = jnp.ones((2, 3, 2, 4))
    lengths = jnp.array([0, 2])

    def total(query, key, value):
        return attend(query, key, value, Scores(0.5), key_length=lengths).sum()

    output, lse = attend_with_lse(x, x, x, Scores(0.5), key_length=lengths)
    assert (output[0] == 0).all()
    assert (lse[0] == -jnp.inf).all()
    assert (output[1] == 1).all()
    for gradient in jax.jit(jax.grad(total, argnums=(0, 1, 2)))(x, x, x):
        assert jnp.isfinite(gradient).all()


def test_tokens_outside_the_vocabulary_never_pass_silently():
    model, variables = build_model(SMALL), golden_scale(SMALL)
    apply = jax.jit(model.apply)
    for wrong in (SMALL.vocab_size, -1):
        logits = apply(variables, jnp.array([[1, wrong, 2]]))
        assert jnp.isnan(logits[0, 1]).all()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"tokens": jnp.zeros((1, 0), jnp.int32)}, "at least one token"),
        ({"inputs_embeds": jnp.zeros((0, 3, 16))}, "batch of 0 sequences: must hold at least one"),
        ({"tokens": jnp.zeros((1, 3))}, "must be integers"),
        ({"tokens": jnp.zeros((3,), jnp.int32)}, "must be integers"),
        ({}, "either tokens or inputs_embeds"),
        ({"inputs_embeds": jnp.zeros((1, 3, 5))}, "model.d_model = 16"),
        ({"tokens": IDS, "documents": IDS[:, 1:]}, r"documents int32\[2, 8\]: must be .* = \[2, 9\]"),
        ({"tokens": IDS, "documents": IDS[:1]}, r"documents int32\[1, 9\]: must be .* = \[2, 9\]"),
        ({"tokens": IDS, "documents": IDS * 1.0}, r"documents float32\[2, 9\]: must be integers"),
        ({"tokens": IDS, "start": -1}, r"start = -1: must be a position of the sequence, 0 \.\. 8"),
        ({"tokens": IDS, "start": 9}, r"start = 9: must be"),
    ],
)
def test_bad_inputs_are_refused(inputs, message):
    """`documents` that are too short, or a negative `start`, would otherwise give other numbers without a word."""
    model = build_model(SMALL)
    with pytest.raises(DataError, match=message):
        model.apply(golden_scale(SMALL), **inputs, method=model.hidden_states)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 7}, "model.num_heads = 7: must divide model.d_model = 432"),
        ({"d_model": 36, "num_heads": 12}, "model.num_heads = 12: makes heads 3 wide"),
        ({"hidden_depth": -1}, "model.hidden_depth = -1"),
        ({"generation_window": 0}, "model.generation_window = 0"),
        ({"history_window": 0}, "model.history_window = 0"),
        ({"history_window": "wide"}, "model.history_window = 'wide'"),
        ({"architecture": "mamba"}, "model.architecture = 'mamba': must be one of tlinformer"),
        ({"dtype": "int8"}, "model.dtype = 'int8'"),
        ({"dropout": 1.0}, "model.dropout = 1.0"),
        ({"num_blocks": True}, "model.num_blocks = True"),
        ({"memory": "none"}, "model.memory = 'none': must be one of auto, low"),
        ({"attention": "cudnn", "dropout": 0.1}, "model.attention = 'cudnn'"),
        ({"architecture": "sliding_window", "history_window": "auto"}, "model.history_window = 'auto'"),
    ],
)
def test_bad_configurations_name_field_value_and_what_is_allowed(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        ModelConfig(**fields)
    assert "\n" not in str(caught.value)


def test_dtypes_may_be_given_as_objects():
    assert ModelConfig(dtype=jnp.bfloat16).dtype == "bfloat16"
    with pytest.raises(ValueError, match=r"model\.dtype"):
        ModelConfig(dtype=3.5)

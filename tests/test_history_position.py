"""`model.history_position` 'none' against the NumPy reference, on every path that reads the whole history.

The two reads that span it, C's keys in `compress` and C's queries in `restore`, are not rotated on either side; all
others are.
"""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.test_context import make_decoder as spread_decoder
from tests.decoding.test_context import small_caches
from tests.decoding.test_exactness import TOLERANCE, check_every_way, compared, largest_error, make_decoder, truth
from tests.parallel.test_batch_split import MESHES, check
from tests.parallel.test_batch_split import MODEL as TRAINED
from tests.support import golden, reference
from tests.support.models import SMALL
from tests.support.optional import need_modules
from tests.test_window_sampling import LENGTH, batch_of, loss_and_gradient
from tlinformer_jax import ModelConfig, build_model
from tlinformer_jax.analysis.flops import training_flops
from tlinformer_jax.config.model import WINDOWED, ExecutionPlan
from tlinformer_jax.decoding import cache as cache_module
from tlinformer_jax.decoding import cache_bytes, history, windowed
from tlinformer_jax.decoding.cache import WindowedCache
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.interop import params_from_reference, params_to_reference
from tlinformer_jax.interop.files import read_weights, write_safetensors
from tlinformer_jax.models import block as block_module
from tlinformer_jax.models import cached_attention
from tlinformer_jax.models.block import DualWindowBlock
from tlinformer_jax.models.rope import rope_table, rotate
from tlinformer_jax.models.streams import History, Stream

NOPE = dataclasses.replace(SMALL, hidden_depth=0, history_window=3, history_position="none")
PROMPTS = [3, 8, 9, 1, 12]  # before, at and after the edges of windows of 4
FED = 27
# TConstFormer has less of the same, and takes as long to compile.
QUICK = [pytest.param(name, marks=pytest.mark.slow if name == "tconstformer" else ()) for name in WINDOWED]


def nope(architecture: str = "tlinformer", **changes) -> ModelConfig:
    return dataclasses.replace(NOPE, architecture=architecture, **changes)


def rotary(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, history_position="rotary")


def golden_scale(config: ModelConfig):
    return params_from_reference(golden.random_weights(config), config)


# ---- The forward pass


PLANS = {
    "whole": ExecutionPlan(),
    "chunks": ExecutionPlan(segments=2, chunk=2, checkpointing=True),
    "together": ExecutionPlan(together=2, scan_layers=False),
}
FORWARD = [
    ("tlinformer", "chunks", {"num_blocks": 3}, True),
    ("tlinformer", "together", {"hidden_depth": 2}, False),
    ("tlinformer", "whole", {"history_window": "auto", "hidden_depth": 1}, False),
    ("tconstformer", "chunks", {"hidden_depth": 2}, False),
    ("tconstformer", "together", {"history_window": 9}, False),
]


@pytest.mark.parametrize(
    ("architecture", "plan", "changes"),
    [pytest.param(*case, marks=() if quick else pytest.mark.slow) for *case, quick in FORWARD],
)
def test_logits_are_the_references(architecture, plan, changes):
    config = nope(architecture, memory=PLANS[plan], **changes)
    tokens, expected = truth(config, FED, 2)
    logits = jax.jit(build_model(config).apply)(golden_scale(config), tokens)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE)
    others = reference.logits(golden.random_weights(config), rotary(config), tokens)
    size = config.generation_window
    np.testing.assert_array_equal(others[:, :size], expected[:, :size])
    assert np.abs(others - expected)[:, 2 * size :].max(-1).min() > 0.01, "every window with history changes"


def block_by_block(config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """Logits of the last, whole window, by `DualWindowBlock`s with a norm and a head of NumPy."""
    weights, params = golden.random_weights(config), golden_scale(config)["params"]
    rows, size = params["embedding"][tokens], config.generation_window
    C, x = rows[:, :-size], rows[:, -size:]
    for number in range(config.num_blocks):
        x, C = DualWindowBlock(config).apply({"params": params[f"blocks_{number}"]}, x, C)
    x = reference._norm(np.asarray(x), weights["transformer.norm.weight"], weights["transformer.norm.bias"])
    return x @ weights["embedding.weight"].T


@pytest.mark.parametrize("architecture", QUICK)
def test_a_block_of_its_own_reads_as_those_of_the_model(architecture):
    config = nope(architecture)
    tokens, expected = truth(config, 20, 2)
    np.testing.assert_allclose(block_by_block(config, tokens), expected[:, -4:], atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", QUICK)
def test_history_before_the_observation_window_is_a_set(architecture):
    """In any order it gives the same logits, as nothing but rotations tells order; and with rotations it does not."""
    config = nope(architecture, hidden_depth=1)
    tokens, _ = truth(config, 24, 1)
    order = np.arange(24)
    order[:17] = np.random.default_rng(1).permutation(17)  # a window of 4, and 3 rows that it observes, stay
    assert (order[:17] != np.arange(17)).sum() > 10
    variables, both = golden_scale(config), np.concatenate([tokens, tokens[:, order]])
    first, second = build_model(config).apply(variables, both)[:, -4:]
    np.testing.assert_allclose(first, second, atol=TOLERANCE)
    first, second = build_model(rotary(config)).apply(variables, both)[:, -4:]
    assert np.abs(first - second).max() > 0.01
    decoder = make_decoder(config)
    cache = decoder.init_cache(2, 24)
    for row in range(2):
        cache, _ = decoder.prefill(cache, row, both[row, :21])
    # A key does not depend on where its token stands, in no block.
    for keys in (kept.key for kept in cache.history):
        np.testing.assert_allclose(keys[1, ..., :20], keys[0][..., order[:20]], atol=TOLERANCE)


def test_parameters_and_costs_are_those_of_the_published_model():
    assert ModelConfig().history_position == "rotary"
    tokens = np.zeros((1, 4), np.int32)
    ours, theirs = (build_model(config).init(jax.random.key(3), tokens) for config in (NOPE, rotary(NOPE)))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert training_flops(NOPE, 64) == training_flops(rotary(NOPE), 64)
    sizes = [cache_bytes(config, make_decoder(config).init_cache(1, 20), [20]) for config in (NOPE, rotary(NOPE))]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("architecture", ["transformer", "sliding_window"])
def test_baselines_have_no_history_apart(architecture):
    with pytest.raises(
        ConfigError, match=rf"model\.history_position = 'none': must be 'rotary' for .* '{architecture}'"
    ):
        ModelConfig(architecture=architecture, history_position="none")
    with pytest.raises(ConfigError, match=r"model\.history_position = 'NoPE': must be one of rotary, none"):
        ModelConfig(history_position="NoPE")


# ---- Mistakes in the forward pass


def rotated_keys_of_C(monkeypatch):
    """Keys of the history are rotated, what reads them is not."""
    real = History.read

    def mutated(C, query, config, dropout):
        return real(dataclasses.replace(C, K=rotate(C.K, C.rope.rows(0, C.K.shape[1]))), query, config, dropout)

    monkeypatch.setattr(History, "read", mutated)


def rotated_query_of_x(monkeypatch):
    """x reads the history by its rotated query."""
    monkeypatch.setattr(Stream, "far_Q", property(lambda x: x.Q))


def rotated_query_of_z(monkeypatch):
    """z reads the history by rotated queries."""
    real = block_module.observed_stream

    def mutated(layer, C, window, batch):
        z = real(layer, C, window, batch)
        return dataclasses.replace(z, Q=rotate(z.Q, window.z_rope))

    monkeypatch.setattr(block_module, "observed_stream", mutated)


def x_without_positions(monkeypatch):
    """x's rows read each other in `compress` without positions."""
    monkeypatch.setattr(block_module, "window_stream", lambda C, x, window: x)


def rotated_key_of_z(monkeypatch):
    """The history reads z by rotated keys."""
    monkeypatch.setattr(Stream, "far_K", property(lambda z: z.K))


def key_of_z_not_rotated(monkeypatch):
    """x reads z in `restore` by keys that are not rotated."""
    real = Stream.rotated

    def mutated(stream, rope):
        turned = real(stream, rope)
        return turned if stream.Q is not None else dataclasses.replace(turned, K=stream.K)

    monkeypatch.setattr(Stream, "rotated", mutated)


FORWARD_MISTAKES = (
    rotated_keys_of_C,
    rotated_query_of_x,
    rotated_query_of_z,
    x_without_positions,
    rotated_key_of_z,
    key_of_z_not_rotated,
)


@pytest.mark.slow
@pytest.mark.parametrize("mutate", FORWARD_MISTAKES, ids=lambda mutate: mutate.__name__)
def test_mistakes_in_the_forward_pass_are_caught(mutate, monkeypatch, own_traces):
    mutate(monkeypatch)
    tokens, expected = truth(NOPE, 20, 2)
    logits = build_model(NOPE).apply(golden_scale(NOPE), tokens)
    assert np.abs(logits - expected).max() > 100 * TOLERANCE


# ---- Generation


@pytest.mark.slow
@pytest.mark.parametrize("architecture", QUICK)
def test_prefill_step_and_slide_equal_the_reference(architecture):
    """Prompts of unequal lengths in one batch, each continued across at least three slides."""
    check_every_way(nope(architecture, hidden_depth=1), PROMPTS, FED, alone=(1, 8, 9, FED))


@pytest.mark.slow
@pytest.mark.parametrize("rows_per_token", [0, 4])
def test_chunks_and_growing_caches_change_nothing(rows_per_token, monkeypatch, own_traces):
    """Several chunks and rounds; block 0's rows projected, or looked up by token."""
    monkeypatch.setattr(cache_module, "SMALLEST_CLASS", 16)
    monkeypatch.setattr(cache_module, "CHUNK_ROWS", 4)
    monkeypatch.setattr(cache_module, "ROUNDS", 2)
    monkeypatch.setattr(history, "ROWS_PER_TOKEN", rows_per_token)
    config = nope(num_blocks=3, history_window="auto", generation_window=6)
    assert largest_error(make_decoder(config), [21, 2], 46, room=21) < TOLERANCE


@pytest.mark.parametrize(
    ("architecture", "context", "changes"),
    [
        pytest.param("tlinformer", 8, {"num_blocks": 3, "token_shift": True}, marks=pytest.mark.slow),
        pytest.param("tconstformer", 8, {}, marks=pytest.mark.slow),
    ],
)
def test_a_history_over_devices_equals_the_reference(architecture, context, changes, monkeypatch, own_traces):
    """Windows of 5, which no number of devices divides; growing caches of several chunks."""
    small_caches(monkeypatch, rows_per_token=0)
    config = nope(architecture, generation_window=5, history_window=7, **changes)
    assert largest_error(spread_decoder(config, context), [5, 16, 1], 33, room=16) < TOLERANCE


def rotated_writer(module, monkeypatch):
    real = module.write_rows

    def mutated(cache, row, start, layer, rows, rope, *rest):
        turned = rope_table(start + jnp.arange(rows.shape[1], dtype=jnp.int32), NOPE.head_dim)
        return real(cache, row, start, layer, rows, turned, *rest)

    monkeypatch.setattr(module, "write_rows", mutated)


def slide_writes_rotated_keys(monkeypatch):
    """A slide appends rotated keys to block 0's history."""
    rotated_writer(windowed, monkeypatch)


def rotated_keys_are_made(monkeypatch):
    """`prefill`, and a slide of later blocks, make rotated keys."""
    rotated_writer(history, monkeypatch)


def step_rotates_its_query_of_the_history(monkeypatch):
    """A token reads the history by its rotated query."""
    real = WindowedCache.read_by

    def mutated(cache, config, layer):
        window, context = real(cache, config, layer)
        return window, context and dataclasses.replace(context, rotary=True)

    monkeypatch.setattr(WindowedCache, "read_by", mutated)


def step_reads_its_window_without_positions(monkeypatch):
    """In `compress` a token reads its window by a query that is not rotated."""
    real = cached_attention.attend_cached
    monkeypatch.setattr(
        cached_attention, "attend_cached", lambda query, far_query, *rest: real(far_query, far_query, *rest)
    )


def slide_without_observed_queries(monkeypatch):
    """The queries of z are rotated where blocks are rebuilt."""
    real = windowed.embedded_history

    def mutated(params, at, z_rows, z_rope, fill):
        positions = at.length - 3 + jnp.arange(z_rows.shape[1], dtype=jnp.int32)
        return real(params, at, z_rows, rope_table(jnp.maximum(positions, 0), NOPE.head_dim), fill)

    monkeypatch.setattr(windowed, "embedded_history", mutated)


DECODER_MISTAKES = (
    slide_writes_rotated_keys,
    rotated_keys_are_made,
    step_rotates_its_query_of_the_history,
    step_reads_its_window_without_positions,
    slide_without_observed_queries,
    rotated_query_of_x,
    rotated_key_of_z,
    key_of_z_not_rotated,
)


@pytest.mark.slow
@pytest.mark.parametrize("mutate", DECODER_MISTAKES, ids=lambda mutate: mutate.__name__)
def test_mistakes_in_the_decoder_are_caught(mutate, monkeypatch, own_traces):
    mutate(monkeypatch)
    error, _ = compared(make_decoder(NOPE), [3, 8, 9], 20)
    assert error > 100 * TOLERANCE


# ---- Training


@pytest.mark.parametrize("architecture", QUICK)
@pytest.mark.parametrize("plan", [pytest.param("whole", marks=pytest.mark.slow), "chunks"])
def test_gradients_are_the_references_slopes(architecture, plan):
    """Along a random direction of what projects queries, keys and values in every layer."""
    config = nope(architecture, memory=PLANS[plan])
    weights, batch, rng = golden.random_weights(config), batch_of(), np.random.default_rng(8)
    value, gradients = loss_and_gradient(config)(golden_scale(config)["params"], None)
    published = params_to_reference({"params": gradients}, config)
    directions = {
        name: rng.standard_normal(array.shape) for name, array in weights.items() if name.endswith("qkv_proj.weight")
    }

    def truth_at(step: float) -> float:
        moved = weights | {name: weights[name].astype(np.float64) + step * to for name, to in directions.items()}
        return reference.mean_loss(reference.logits(moved, config, batch["inputs"]), batch["labels"])

    assert float(value) == pytest.approx(truth_at(0), rel=1e-5)
    slope = (truth_at(1e-5) - truth_at(-1e-5)) / 2e-5
    assert abs(slope) > 0.01
    assert sum(np.vdot(published[name], to) for name, to in directions.items()) == pytest.approx(slope, rel=1e-3)


CHUNKED = {"memory": ExecutionPlan(chunk=2, checkpointing=True), "num_blocks": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "architecture", "changes"),
    [
        ("context", "tlinformer", CHUNKED),
        ("fsdp, tensor", "tlinformer", {}),
        ("context", "tconstformer", {"hidden_depth": 1}),
    ],
)
def test_loss_and_gradients_on_eight_devices_are_those_of_one(axes, architecture, changes):
    check(dataclasses.replace(TRAINED, history_position="none", architecture=architecture, **changes), MESHES[axes])


@pytest.mark.slow
def test_sampled_windows_are_unbiased():
    """The mean over every two of five windows is the whole."""
    config = nope(history_window=5, memory=ExecutionPlan(2))
    function, params = loss_and_gradient(config), golden_scale(config)["params"]
    loss, gradients = function(params, None)
    sampled = [function(params, jnp.array(subset)) for subset in itertools.combinations(range(-(-LENGTH // 4)), 2)]
    assert np.mean([float(value) for value, _ in sampled]) == pytest.approx(float(loss), rel=1e-6)
    for layer in ("compress", "restore"):
        mean = np.mean([np.asarray(each["blocks_0"][layer]["qkv_kernel"], np.float64) for _, each in sampled], axis=0)
        expected = gradients["blocks_0"][layer]["qkv_kernel"]
        np.testing.assert_allclose(mean, expected, atol=1e-5 * np.abs(expected).max())


# ---- Files


def test_safetensors_say_what_reads_have_positions(tmp_path):
    need_modules("safetensors", extra="convert")
    import safetensors

    variables = golden_scale(NOPE)
    for config in (NOPE, rotary(NOPE)):
        path = tmp_path / f"{config.history_position}.safetensors"
        write_safetensors(path, params_to_reference(variables, config), config)
        jax.tree.map(np.testing.assert_array_equal, params_from_reference(read_weights(path), config), variables)
        with safetensors.safe_open(path, "numpy") as file:
            shape = json.loads(file.metadata()["tlinformer"])
        assert shape.get("history_position", "rotary") == config.history_position

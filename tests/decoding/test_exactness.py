"""The cached decoder against the independent NumPy reference: every logit, across window edges and slides."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.uncached import jit_uncached_logits
from tests.support import golden, reference
from tests.support.models import SMALL
from tlinformer_jax import ModelConfig, build_model
from tlinformer_jax.decoding import cache as cache_module
from tlinformer_jax.decoding import history, windowed
from tlinformer_jax.decoding.cache import WindowedCache, history_of
from tlinformer_jax.decoding.decoder import Decoder
from tlinformer_jax.interop import params_from_reference

TOLERANCE = 2e-5


@functools.cache
def truth(config: ModelConfig, length: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [batch, length], and the reference's logits [batch, length, V] of them."""
    tokens = np.random.default_rng(length).integers(0, config.vocab_size, (batch, length))
    logits = reference.logits(golden.random_weights(config), config, tokens)
    assert logits.std() > 0.5, "the weights must be large enough for the comparison to mean something"
    return tokens, logits


def make_decoder(config: ModelConfig) -> Decoder:
    return Decoder(build_model(config), params_from_reference(golden.random_weights(config), config))


def compared(decoder: Decoder, prompts: list[int], length: int, room: int | None = None) -> tuple[float, bool]:
    """The largest error of a logit by `errors_of`, against the reference; and whether positions were always right."""
    errors, in_place = errors_of(decoder, prompts, *truth(decoder.config, length, len(prompts)), room)
    return float(np.nanmax(errors)), in_place


def errors_of(
    decoder: Decoder,
    prompts: list[int],
    tokens: np.ndarray,
    expected: np.ndarray,
    room: int | None = None,
    cache_dtype: str = "auto",
) -> tuple[np.ndarray, bool]:
    """Feeds each sequence its first `prompts[row]` tokens by `prefill`, the rest one by one; compares every logit.

    Args:
      decoder: with golden-scale weights.
      prompts: prompt lengths, one a sequence.
      tokens: that every sequence has in the end, [batch, length].
      expected: logits, [batch, length, V].
      room: tokens the first cache is made for; None makes it large enough for all.
      cache_dtype: of the cache.

    Returns:
      the largest error of a logit at each position, [batch, length], NaN before a prompt's last; and whether the cache
      always had as many positions as it was fed tokens.
    """
    config, length = decoder.config, tokens.shape[1]
    cache = decoder.init_cache(len(prompts), room or length, cache_dtype=cache_dtype)
    lengths, errors, in_place = np.array(prompts), np.full(tokens.shape, np.nan), True
    for row, prompt in enumerate(prompts):
        cache, logits = decoder.prefill(cache, row, tokens[row, :prompt])
        errors[row, prompt - 1] = np.abs(np.asarray(logits) - expected[row, prompt - 1]).max()
    while (lengths < length).any():
        active = lengths < length
        cache = decoder.grow(cache, int(lengths[active].max()) + 1)
        for row in np.flatnonzero(active):
            if config.windowed and history_of(config, lengths[row] + 1) > history_of(config, lengths[row]):
                cache = decoder.slide(cache, int(row), int(lengths[row]))
        fed = tokens[np.arange(len(prompts)), np.minimum(lengths, length - 1)].astype(np.int32)
        cache, logits = decoder.step(cache, fed, active)
        for row in np.flatnonzero(active):
            errors[row, lengths[row]] = np.abs(np.asarray(logits[row]) - expected[row, lengths[row]]).max()
        lengths += active
        in_place = in_place and np.array_equal(cache.position, lengths)
    return errors, in_place


def largest_error(decoder: Decoder, prompts: list[int], length: int, room: int | None = None) -> float:
    """The largest error of a logit by `compared`; infinite where the cache loses count of positions."""
    error, in_place = compared(decoder, prompts, length, room)
    return error if in_place else np.inf


SHAPES = {
    "paper's block": {"hidden_depth": 2, "history_window": 9},
    "one block": {"num_blocks": 1},
    "auto": {"history_window": "auto", "generation_window": 6},
    "auto, one token": {"history_window": "auto", "generation_window": 1, "hidden_depth": 0},
    "causal history": {
        "causal_history": True,
        "token_shift": True,
        "key_taps": 2,
        "history_window": 9,
    },
    "causal history, short z": {"causal_history": True, "history_window": 3},
    "causal history, auto": {"causal_history": True, "history_window": "auto", "generation_window": 6},
    "causal history, auto, one token": {
        "causal_history": True,
        "num_blocks": 3,
        "history_window": "auto",
        "generation_window": 1,
        "hidden_depth": 0,
    },
    "tconstformer": {"architecture": "tconstformer"},
    "tconstformer, auto": {"architecture": "tconstformer", "history_window": "auto", "hidden_depth": 0},
    "transformer": {"architecture": "transformer", "hidden_depth": 0},
    "sliding window": {"architecture": "sliding_window", "hidden_depth": 0, "history_window": 3},
}
# Three blocks of a causal history: tests/decoding/test_causal.py. Others of three blocks, without a hidden layer, are
# in the slow cases of the test after this one, in chunks besides.
SLOW = ("one block", "auto, one token", "causal history, auto, one token", "tconstformer, auto")


def shapes():
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in SHAPES]


@pytest.mark.parametrize("name", shapes())
def test_prefill_step_and_slide_equal_the_reference(name):
    """Prompts around the window edges, each continued across at least three slides, in one batch."""
    config = dataclasses.replace(SMALL, **SHAPES[name])
    size = config.generation_window
    prompts = [max(size - 1, 1), size, size + 1, 1, 3 * size - 1, 3 * size, 3 * size + 1]
    assert largest_error(make_decoder(config), prompts, 6 * size + 3) < TOLERANCE


@pytest.mark.parametrize(
    ("architecture", "rows_per_token", "blocks", "causal"),
    [
        ("tlinformer", 4, 2, False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("tlinformer", 0, 3, False),
                ("tlinformer", 4, 3, True),
                ("tconstformer", 4, 2, False),
                ("transformer", 4, 2, False),
            )
        ),
    ],
)
def test_chunks_and_growing_caches_change_nothing(
    architecture, rows_per_token, blocks, causal, monkeypatch, own_traces
):
    """Histories of several chunks and rounds, caches that grow class by class from the smallest; block 0's rows
    projected, or looked up by token. The Transformer with the token shift, whose last token its cache holds, the others
    with key taps."""
    monkeypatch.setattr(cache_module, "SMALLEST_CLASS", 16)
    monkeypatch.setattr(cache_module, "CHUNK_ROWS", 4)
    monkeypatch.setattr(cache_module, "ROUNDS", 2)
    monkeypatch.setattr(history, "ROWS_PER_TOKEN", rows_per_token)
    options = {"token_shift": architecture == "transformer", "hidden_depth": 0, "history_window": 5}
    options |= {"key_taps": 0 if architecture == "transformer" else 2, "causal_history": causal}
    config = dataclasses.replace(SMALL, architecture=architecture, num_blocks=blocks, **options)
    assert largest_error(make_decoder(config), [21, 2], 33, room=21) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "rows_per_token", "wavelength", "overlap", "causal"),
    [
        ("tlinformer", 4, 60, 17, False),
        ("tlinformer", 0, 0, 0, False),
        ("tlinformer", 0, 0, 0, True),
        ("transformer", 0, 60, 0, False),
    ],
)
def test_the_gpu_kernels_in_the_decoder(
    architecture, rows_per_token, wavelength, overlap, causal, monkeypatch, interpreted_kernels
):
    """Tokens and rows stored and read by the kernels, in half precision."""
    monkeypatch.setattr(history, "ROWS_PER_TOKEN", rows_per_token)
    windows = {"history_window": 40, "generation_window": 64, "window_overlap": overlap, "causal_history": causal}
    half = {"dtype": "float16", "attention": "auto", "d_model": 24, "hidden_depth": 0}
    options = {"longest_wavelength": wavelength, "token_shift": not rows_per_token}
    options |= {"key_taps": 2 * (architecture == "tlinformer")}
    config = dataclasses.replace(SMALL, architecture=architecture, **options, **windows, **half)
    # float16 keeps 11 bits; the logits' largest is about 4.
    assert largest_error(make_decoder(config), [127, 64], 131) < 0.05
    expected = {"attend_cached", "dense"}
    if architecture == "tlinformer":
        expected |= {"attend_history", "store_products"} | ({"store_tokens"} if rows_per_token else set())
        expected |= set() if causal else {"attend_context"}
    assert interpreted_kernels == expected


@pytest.mark.parametrize("architecture", ["tlinformer", "transformer"])
def test_what_the_cache_has_no_room_for_is_refused(architecture):
    """Rows past the capacity would be dropped or written over others, and the logits would be wrong."""
    config = dataclasses.replace(SMALL, architecture=architecture, num_blocks=1, hidden_depth=0)
    decoder = make_decoder(config)
    cache = decoder.init_cache(1, 5)
    room = cache.capacity + config.generation_window if config.windowed else cache.capacity
    with pytest.raises(ValueError, match="prefill: the prompt must have at least one token"):
        decoder.prefill(cache, 0, np.zeros(0, np.int32))
    with pytest.raises(ValueError, match=r"Decoder\.prefill: the cache has 1,024 rows, and 1,02. are needed"):
        decoder.prefill(cache, 0, np.zeros(room + 1, np.int32))
    if config.windowed:
        cache, _ = decoder.prefill(cache, 0, np.zeros(room, np.int32))
        with pytest.raises(ValueError, match=r"Decoder\.slide: the cache has 1,024 rows, and 1,028 are needed; call"):
            decoder.slide(cache, 0, room)
        with pytest.raises(ValueError, match=r"Decoder\.slide: 1,027 tokens do not fill windows of 4"):
            decoder.slide(cache, 0, room - 1)


def check_every_way(config: ModelConfig, prompts: list[int], length: int, alone: tuple[int, ...]) -> None:
    """Prefill, steps and slides of prompts of unequal lengths, and the uncached logits after `alone` tokens."""
    decoder = make_decoder(config)
    assert largest_error(decoder, prompts, length) < TOLERANCE
    tokens, expected = truth(config, length, len(prompts))
    for count in alone:
        logits = jit_uncached_logits(decoder.params, config, jnp.asarray(tokens[0, :count], jnp.int32))
        np.testing.assert_allclose(logits, expected[0, count - 1], atol=TOLERANCE)


def stale_history(monkeypatch):
    """A slide appends the window to block 0's history but does not rebuild the later blocks'."""
    real = windowed._rebuild

    def mutated(params, config, cache, row, length, observed, window_tokens):
        new, x = real(params, config, cache, row, length, observed, window_tokens)
        if window_tokens.size == 0:
            new = dataclasses.replace(new, history=(new.history[0], *cache.history[1:]))
        return new, x

    monkeypatch.setattr(windowed, "_rebuild", mutated)


def stale_context(monkeypatch):
    """A slide keeps the compressed context of the history before it."""
    real = windowed._rebuild

    def mutated(params, config, cache, row, length, observed, window_tokens):
        new, x = real(params, config, cache, row, length, observed, window_tokens)
        return (dataclasses.replace(new, context=cache.context) if window_tokens.size == 0 else new), x

    monkeypatch.setattr(windowed, "_rebuild", mutated)


def wrong_phase(monkeypatch):
    """A prompt of whole windows ends in an empty window instead of a full one."""
    real = windowed.prefill

    def mutated(params, config, cache, row, prompt, length, observed):
        cache, logits = real(params, config, cache, row, prompt, length, observed)
        size = config.generation_window
        moved = cache.window_length[row] // size * size  # all of a full window, or nothing
        return dataclasses.replace(
            cache,
            window_length=cache.window_length.at[row].add(-moved),
            history_length=cache.history_length.at[row].add(moved),
        ), logits

    monkeypatch.setattr(windowed, "prefill", mutated)


def missing_slide(monkeypatch):
    """The window is emptied and the positions go on, but the history stays as it was."""

    def mutated(params, config, cache, row, observed):
        size = config.generation_window
        return dataclasses.replace(
            cache,
            history_length=cache.history_length.at[row].add(size),
            window_length=cache.window_length.at[row].set(0),
        )

    monkeypatch.setattr(windowed, "slide", mutated)


def step_without_history(monkeypatch):
    """A token does not read the history in `compress`."""
    real = WindowedCache.read_by

    def mutated(cache, config, layer):
        window, context = real(cache, config, layer)
        return window, None if layer % config.layers_per_block == 0 else context

    monkeypatch.setattr(WindowedCache, "read_by", mutated)


@pytest.mark.parametrize(
    "mutate", [stale_history, stale_context, wrong_phase, missing_slide, step_without_history], ids=lambda m: m.__name__
)
def test_mutations_are_caught(mutate, monkeypatch, own_traces):
    """Each fault in the decoder makes logits wrong, by far."""
    mutate(monkeypatch)
    config = dataclasses.replace(SMALL, hidden_depth=0)
    error, _ = compared(make_decoder(config), [3, 8, 9], 20)
    assert error > 100 * TOLERANCE


@pytest.mark.skipif(not golden.available(), reason=f"no golden files in {golden.FOLDER}")
@pytest.mark.parametrize("name", ["tlin_auto", pytest.param("tlin_asym", marks=pytest.mark.slow)])
def test_decoder_equals_golden_logits(name):
    """The published models' own logits, the prompt's by `prefill`, the others token by token."""
    file = golden.load(name, attention="xla")
    decoder = Decoder(build_model(file.config), params_from_reference(file.params, file.config))
    length = file.inputs.shape[1]
    prompt = file.config.generation_window + 1
    cache = decoder.init_cache(1, length)
    cache, logits = decoder.prefill(cache, 0, file.inputs[0, :prompt])
    errors = [np.abs(np.asarray(logits) - file.logits[0, prompt - 1]).max()]
    for position in range(prompt, length):
        if position % file.config.generation_window == 0:
            cache = decoder.slide(cache, 0, position)
        cache, logits = decoder.step(cache, file.inputs[:1, position], np.ones(1, bool))
        errors.append(np.abs(np.asarray(logits[0]) - file.logits[0, position]).max())
    assert max(errors) < TOLERANCE
    assert jax.tree.all(jax.tree.map(lambda array: bool(np.isfinite(array).all()), cache))

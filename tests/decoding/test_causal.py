"""Histories of later blocks with `model.causal_history`: `prefill` and `slide` fill the same cache, in groups of
windows, from int8 rows, and on several devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.test_context import make_decoder
from tests.decoding.test_exactness import TOLERANCE, compared, errors_of, truth
from tests.decoding.test_int8_cache import quantised_truth
from tests.support.models import SMALL
from tlinformer_jax.decoding import cache as cache_module
from tlinformer_jax.decoding import causal, windowed
from tlinformer_jax.decoding.decoder import Decoder
from tlinformer_jax.decoding.history import SequenceRows
from tlinformer_jax.models.causal_history import WINDOWS_TOGETHER
from tlinformer_jax.models.streams import Stream

# z is longer than a window, and no whole number of windows.
CONFIG = dataclasses.replace(
    SMALL, causal_history=True, token_shift=True, key_taps=2, num_blocks=3, hidden_depth=0, history_window=5
)
# The history fills the cache. Its five windows are computed two at a time, so the last two groups overlap.
PROMPT = 21
ROOM = 20


@pytest.fixture(scope="module", autouse=True)
def small_caches():
    """For all tests of this file, which share their programs; a test that changes code has `own_traces` besides."""
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "CHUNK_ROWS", ROOM)
        patch.setattr(cache_module, "SMALLEST_CLASS", 16)
        yield
    jax.clear_caches()


def filled_by(decoder: Decoder, prompt: int, cache_dtype: str):
    """The cache of two sequences of PROMPT tokens, `prompt` of them by `prefill` and the others by steps and slides."""
    tokens, _ = truth(CONFIG, PROMPT, 2)
    cache, size = decoder.init_cache(2, PROMPT, cache_dtype), decoder.config.generation_window
    for row in range(2):
        cache, _ = decoder.prefill(cache, row, tokens[row, :prompt])
    for position in range(prompt, PROMPT):
        if position % size == 0:
            for row in range(2):
                cache = decoder.slide(cache, row, position)
        cache, _ = decoder.step(cache, tokens[:, position].astype(np.int32), np.ones(2, bool))
    return cache


@pytest.mark.parametrize(
    ("cache_dtype", "devices"),
    [
        ("auto", 1),
        ("int8", 1),
        pytest.param("auto", 3, marks=pytest.mark.slow),
        pytest.param("int8", 2, marks=pytest.mark.slow),
    ],
)
def test_prefill_and_slides_fill_the_same_cache(cache_dtype, devices):
    """In int8 but for numbers that float32 rounds to the other side."""
    decoder = make_decoder(CONFIG, devices)
    prefilled, slid = (filled_by(decoder, prompt, cache_dtype) for prompt in (PROMPT, 3))
    assert devices > 1 or prefilled.capacity == ROOM
    np.testing.assert_array_equal(prefilled.history_length, [ROOM, ROOM])
    np.testing.assert_array_equal(slid.history_length, [ROOM, ROOM])
    rows = prefilled.capacity // devices
    valid = [device * rows + row for device in range(devices) for row in range(-(-(ROOM - device) // devices))]
    for first, second in zip(*(jax.tree.leaves(cache.history) for cache in (prefilled, slid)), strict=True):
        one, other = (np.asarray(array).astype(np.float32)[..., valid] for array in (first, second))
        assert np.abs(one).max(-1).min() > 0
        differs = np.abs(one - other)
        if first.dtype == np.float32:
            assert differs.max() < TOLERANCE
        else:
            assert (differs <= (1 if first.dtype == np.int8 else 0.01 * one)).all()
            assert (differs > 0).mean() < 0.01


@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
def test_every_logit_after_a_prompt_of_several_groups(cache_dtype):
    """Against the reference, which quantises the rows before z; further slides grow the cache."""
    expected = truth if cache_dtype == "auto" else quantised_truth
    tokens, logits = expected(CONFIG, 30, 2)
    errors, in_place = errors_of(make_decoder(CONFIG, 1), [PROMPT, 6], tokens, logits, PROMPT, cache_dtype)
    errors = errors[np.isfinite(errors)]
    assert in_place
    assert np.median(errors) < TOLERANCE
    assert errors.max() < (TOLERANCE if cache_dtype == "auto" else 0.02)


@pytest.mark.parametrize(("history_window", "prompt", "room"), [(4, PROMPT, PROMPT), ("auto", 201, 400)])
def test_every_logit_where_observation_windows_are_neighbours_or_grow(history_window, prompt, room):
    """With W_oh = W_og the z of neighbouring windows follow each other. With 'auto' they differ in length: the longest
    has 72 rows, that of window 25 has 56."""
    config = dataclasses.replace(CONFIG, history_window=history_window, num_blocks=2)
    error, _ = compared(make_decoder(config, 1), [prompt], prompt + 9, room)
    assert error < TOLERANCE


@pytest.mark.parametrize("history_window", [4, 5])
def test_the_slices_of_a_prompt_do_not_grow_with_the_cache(history_window, monkeypatch):
    """Many take long to compile. With W_oh = W_og all z of a group are one slice; else a group has few windows."""
    monkeypatch.setattr(cache_module, "CHUNK_ROWS", 4096)
    config = dataclasses.replace(CONFIG, history_window=history_window)
    params = make_decoder(config, 1).params

    def slices(capacity: int) -> int:
        cache = cache_module.init_cache(config, 1, capacity)

        def fill(row, length):
            return causal.fill_histories(SequenceRows(params, config, cache, row, length), cache.history)

        return str(jax.make_jaxpr(fill)(jnp.int32(0), jnp.int32(0))).count(" dynamic_slice[")

    few, many = slices(1024), slices(4096)
    assert few == many
    assert (many < WINDOWS_TOGETHER) == (history_window == config.generation_window)


def without_the_last_window(monkeypatch):
    real = causal.fill_histories

    def mutated(at, histories):
        return real(dataclasses.replace(at, length=at.length - 2 * at.config.generation_window), histories)

    monkeypatch.setattr(windowed, "fill_histories", mutated)


def without_appending(monkeypatch):
    monkeypatch.setattr(windowed, "extend_histories", lambda at, histories, first: histories)


def without_the_first_row_of_z(monkeypatch):
    real = causal._read_windows

    def mutated(*arguments):
        z, *own = real(*arguments)
        key, value = (jnp.roll(array, -1, axis=1) for array in (z.K, z.V))
        return Stream(None, K=key, V=value, length=jnp.maximum(z.length - 1, 0)), *own

    monkeypatch.setattr(causal, "_read_windows", mutated)


def without_z_in_a_token(monkeypatch):
    """A token reads the history up to z, and its own window."""
    monkeypatch.setattr(cache_module.WindowedCache, "rows_in_window", property(lambda self: self.window_length))


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutate",
    [without_the_last_window, without_appending, without_the_first_row_of_z, without_z_in_a_token],
    ids=lambda mutate: mutate.__name__,
)
def test_mutations_are_caught(mutate, monkeypatch, own_traces):
    mutate(monkeypatch)
    config = dataclasses.replace(CONFIG, num_blocks=2)
    error, _ = compared(make_decoder(config, 1), [PROMPT], 30, PROMPT)
    assert error > 100 * TOLERANCE

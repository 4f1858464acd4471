"""What the benchmark times is what it says: tokens against the NumPy reference, phases, calls."""

import copy
import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import parts, timing
from benchmarks.session import Session
from benchmarks.uncached import jit_uncached_logits
from tests.support import golden, reference
from tests.support.models import SMALL
from tlinformer_jax import build_model
from tlinformer_jax.decoding.decoder import Decoder
from tlinformer_jax.decoding.memory import tree_bytes
from tlinformer_jax.interop import params_from_reference


@functools.cache
def decoder_of(architecture: str, overlap: int = 0) -> Decoder:
    config = dataclasses.replace(SMALL, architecture=architecture, window_overlap=overlap)
    return Decoder(build_model(config), params_from_reference(golden.random_weights(config), config))


@pytest.mark.parametrize(("architecture", "length"), [("tlinformer", 3), ("tlinformer", 18), ("transformer", 18)])
def test_a_token_without_a_cache_is_the_models(architecture, length):
    decoder = decoder_of(architecture)
    tokens = np.random.default_rng(length).integers(0, 37, (1, length))
    expected = reference.logits(golden.random_weights(decoder.config), decoder.config, tokens)[0, -1]
    found = jit_uncached_logits(decoder.params, decoder.config, jnp.asarray(tokens[0], jnp.int32))
    assert np.abs(found - expected).max() < 2e-5


@pytest.mark.parametrize(
    ("architecture", "overlap"),
    [
        pytest.param("tlinformer", 0, marks=pytest.mark.slow),
        *(("tlinformer", 3), ("transformer", 0), ("gated_deltanet_hybrid", 0)),
    ],
)
def test_a_session_generates_what_the_model_would(architecture, overlap):
    """Prefill, dispatched steps, the device loop and slides, each token checked; then again after rewinding."""
    decoder = decoder_of(architecture, overlap)
    session = Session(decoder, batch=2, length=10, room=12, seed=0)
    prompts = session.prompts()
    assert prompts.shape == (2, 10)
    tokens = [np.asarray(session.fill(prompts))]
    history, window = session.history, session.window
    assert (history, window) == ((8 - overlap, 2 + overlap) if decoder.config.windowed else (10, 0))
    tokens.append(np.asarray(session.step()))
    for count in (1, 6, 3):  # to the window's end; over one edge; to the middle of a window
        tokens.append(np.asarray(session.generate(count)))
    assert session.history + session.window == 10 + 1 + 1 + 6 + 3
    np.testing.assert_array_equal(session.cache.position, 21)
    last = np.asarray(session.sequences.token)
    fed = fed_tokens(session, prompts, tokens[0])
    logits = reference.logits(golden.random_weights(decoder.config), decoder.config, fed)
    chosen = logits.argmax(-1)
    np.testing.assert_array_equal(fed[:, 10:], chosen[:, 9:-1])
    np.testing.assert_array_equal(last, chosen[:, -1])


def fed_tokens(session: Session, prompts: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Prompts and what was generated and fed, [batch, 21]; a baseline keeps no tokens, so it is asked again."""
    if session.config.windowed:
        return np.asarray(session.cache.tokens)[:, :21]
    session.rewind(10, 0)
    session.fill(prompts)
    fed = [first]
    for _ in range(10):
        fed.append(np.asarray(session.step()))
    session.step()
    return np.concatenate([prompts, np.stack(fed, axis=1)], axis=1)


def test_rewinding_gives_the_same_tokens_again():
    session = Session(decoder_of("tlinformer"), batch=2, length=8, room=8, seed=1)
    session.fill(session.prompts())
    session.slide()
    first = session.sequences.token.copy()
    generated = []
    for _ in range(2):
        session.rewind(8, 0)
        np.testing.assert_array_equal(session.cache.window_length, 0)
        np.testing.assert_array_equal(session.cache.position, 8)
        session.sequences = session.sequences.replace(token=first.copy())
        generated.append(np.asarray(session.loop(4)))
    np.testing.assert_array_equal(*generated)
    assert (generated[0][:4] >= 0).all()
    assert session.must_slide


def test_random_rows_fill_a_baselines_cache():
    session = Session(decoder_of("transformer"), batch=2, length=10, room=4, seed=0)
    session.fill_randomly(seed=0)
    assert session.history == 10
    rows = np.asarray(session.cache.layers.key)
    assert rows.std() == pytest.approx(1, rel=0.1)
    assert len(np.unique(rows[:, 0, 0, 0, 0])) == rows.shape[0]  # no two layers alike
    session.loop(3)
    session.check()


def test_states_are_bytes_in_use():
    session = Session(decoder_of("gated_deltanet"), batch=2, length=10, room=4, seed=0)
    session.fill(session.prompts())
    assert parts.used_bytes(session) == 2 * 6 * 4 * 2 * 8 * 8  # two sequences, six layers, two heads, 8 by 8


def test_logits_that_are_not_finite_are_not_timed():
    decoder = copy.copy(decoder_of("tlinformer"))
    decoder.params = decoder.params.replace(norm_scale=decoder.params.norm_scale * np.nan)
    session = Session(decoder, batch=2, length=10, room=4, seed=0)
    session.fill(session.prompts())
    with pytest.raises(FloatingPointError, match="tlinformer"):
        session.check()


def test_calls_are_prepared_and_counted(monkeypatch):
    log: list[str] = []
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def call(seconds: float) -> None:
        clock[0] += seconds
        log.append("call")

    def prepare() -> None:
        clock[0] += 0.5  # must not be part of any timing, though of the budget
        log.append("prepare")

    found = timing.time_calls(lambda: call(1.0), 2.0, prepare=prepare)
    assert log == ["prepare", "call"] * 4  # the first is not counted
    assert found.seconds == (1.0, 1.0, 1.0)
    assert found.per(4).figures() == {"seconds": 0.25, "best_seconds": 0.25, "calls": 3}
    # Slow calls stop before `least` of them when four budgets are spent; quick ones go on until one is.
    assert len(timing.time_calls(lambda: call(9.0), 2.0).seconds) == 1
    assert len(timing.time_calls(lambda: call(0.25), 2.0).seconds) == 9
    assert len(timing.time_calls(lambda: call(1.0), 0.1, least=1, compiled=True).seconds) == 1
    assert log.count("prepare") == 4
    assert timing.Timing((3.0, 1.0, 2.0)).median == 2.0
    assert timing.Timing((3.0, 1.0, 2.0)).best == 1.0


def test_calls_are_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(timing.jax, "block_until_ready", waited.append)
    timing.time_calls(lambda: "result", 0.0)
    assert waited == ["result"] * 2


def test_bytes_of_arrays():
    array = jnp.ones((3, 5), jnp.bfloat16)
    assert tree_bytes({"a": array, "b": (array,)}) == 60

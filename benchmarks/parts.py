"""The parts of the inference benchmark; each measures one thing at one length and returns its figures."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import limits
from benchmarks.limits import Ceilings, Weights, Work
from benchmarks.session import Session
from benchmarks.timing import Timing, time_calls
from benchmarks.uncached import jit_uncached_logits
from tlinformer_jax.decoding.cache import history_of

# Figure 9's protocol: the number of tokens generated one by one, and the index of the cache hit (from 0).
PROTOCOL_TOKENS = 6
HIT_TOKEN = 2


def figure9(session: Session, budget: float) -> dict[str, Any]:
    """Measures the paper's protocol: a random prompt, then six tokens one by one, each waited for.

    The first token is the cache miss. The hit is the third token, or the next one if the third needed a slide.

    Returns:
      miss_seconds and hit_seconds (medians over several prompts), hit_token (its number, from 1), calls, token_seconds
      (medians), token_slid (whether the token needed a slide), token_cache_bytes (the arrays after the token),
      token_used_bytes (their valid rows).
    """
    rounds: list[list[dict[str, Any]]] = []
    time_calls(lambda: rounds.append(_protocol(session)), budget)
    session.check()
    tokens = list(zip(*rounds[1:]))  # the first round compiles
    medians = [Timing(tuple(token["seconds"] for token in each)).median for each in tokens]
    slid = [each[-1]["slid"] for each in tokens]
    hit = next((number for number in range(HIT_TOKEN, PROTOCOL_TOKENS) if not slid[number]), HIT_TOKEN)
    return {
        "miss_seconds": medians[0],
        "hit_seconds": medians[hit],
        "hit_token": hit + 1,
        "calls": len(rounds) - 1,
        "token_seconds": medians,
        "token_slid": slid,
        "token_cache_bytes": [each[-1]["cache_bytes"] for each in tokens],
        "token_used_bytes": [each[-1]["used_bytes"] for each in tokens],
    }


def _protocol(session: Session) -> list[dict[str, Any]]:
    """Runs one round of the protocol; returns seconds, slid, cache_bytes and used_bytes of each token."""
    prompts, tokens = session.prompts(), []
    for number in range(PROTOCOL_TOKENS):
        slides = number > 0 and session.must_slide
        started = time.perf_counter()
        if slides:
            session.slide()
        jax.block_until_ready(session.step() if number else session.fill(prompts))
        seconds = time.perf_counter() - started
        used = used_bytes(session)
        tokens.append({"seconds": seconds, "slid": slides, "cache_bytes": session.cache_bytes, "used_bytes": used})
    return tokens


def uncached(session: Session, budget: float) -> dict[str, Any]:
    """Times a token without a cache, see `uncached.uncached_logits`."""
    tokens = jnp.asarray(session.prompts()[0])
    params, config = session.decoder.params, session.config
    return time_calls(lambda: jit_uncached_logits(params, config, tokens), budget).figures()


def prefill(session: Session, weights: Weights, ceilings: Ceilings, budget: float) -> dict[str, Any]:
    """Times a prefill alone, of the first sequence."""
    prompt = session.prompts()[0]
    timing = time_calls(lambda: session.prefill_row(0, prompt), budget)
    work = limits.prefill_work(session.config, weights, session.length, session.devices, session.cache_dtype)
    return limits.against(timing, work, ceilings)


def windows(session: Session, count: int, weights: Weights, ceilings: Ceilings, budget: float) -> dict[str, Any]:
    """Measures tokens per second of all sequences over `count` windows after the prompt, slides included."""
    config, size = session.config, session.config.generation_window
    history, window = session.history, session.window
    session.generate(session.room + 1 if config.windowed else 1)  # compiles the loop and the slide
    timing = time_calls(
        lambda: session.generate(count * size),
        budget,
        prepare=lambda: session.rewind(history, window),
        least=1,
        compiled=True,
    )
    session.check()
    work = [part for number in range(count) for part in _window_work(session, weights, session.length // size + number)]
    limit = sum(part.seconds(ceilings)[0] for part in work)
    tokens = count * size * session.batch
    return timing.figures() | {
        "windows": count,
        "slides": count if config.windowed else 0,
        "tokens": tokens,
        "tokens_per_second": tokens / timing.median,
        "limit_seconds": limit,
        "limit_tokens_per_second": tokens / limit,
        "multiple": timing.median / limit,
    }


def _window_work(session: Session, weights: Weights, window: int) -> list[Work]:
    """Returns the work of a generation window: of each of its tokens, and of the slide of each sequence."""
    config, size = session.config, session.config.generation_window
    devices, begin = session.devices, window * size
    history = history_of(config, begin + 1) if config.windowed else begin
    rows = range(begin - history, begin - history + size)
    kept = devices, session.cache_dtype
    hits = [limits.hit_work(config, weights, session.batch, history, row, *kept) for row in rows]
    if not config.windowed or history == 0:
        return hits
    return hits + [limits.slide_work(config, weights, history, *kept)] * session.batch


def sustained(session: Session, weights: Weights, ceilings: Ceilings, budget: float) -> dict[str, Any]:
    """Measures the time per token in the device loop: all tokens of a generation window, without a slide.

    The session must be at the beginning of a window. A token means one token for every sequence of the batch.
    """
    history, size, overlap = session.history, session.config.generation_window, session.overlap
    session.loop(1)  # compiles
    rewind = functools.partial(session.rewind, history, overlap)
    timing = time_calls(lambda: session.loop(size), budget, prepare=rewind, compiled=True).per(size)
    session.check()
    mean = overlap + (size - 1) / 2
    kept = session.devices, session.cache_dtype
    work = limits.hit_work(session.config, weights, session.batch, history, mean, *kept)
    return limits.against(timing, work, ceilings) | {
        "steps": size,
        "history": history,
        "tokens_per_second": session.batch / timing.median,
    }


def slide(session: Session, weights: Weights, ceilings: Ceilings, budget: float) -> dict[str, Any]:
    """Times a slide alone, of the first sequence, after filling the generation windows."""
    before = session.history
    session.loop(session.room)
    window = session.window
    after = history_of(session.config, before + window + 1)

    def call() -> Any:
        session.slide_row(0)
        return session.cache

    timing = time_calls(call, budget, prepare=lambda: session.rewind(before, window))
    work = limits.slide_work(session.config, weights, after, session.devices, session.cache_dtype)
    return limits.against(timing, work, ceilings) | {"history_before": before, "history_after": after}


def longest(session: Session, fill: Callable[[], str]) -> dict[str, Any]:
    """Runs a prompt of the session's length and a whole generation window after it once each, compilation included.

    Args:
      session: new.
      fill: gives the session its prompt, waits, and returns how it did so.
    """
    started = time.perf_counter()
    filled = fill()
    middle = time.perf_counter()
    session.generate(session.config.generation_window)
    jax.block_until_ready(session.cache)
    ended = time.perf_counter()
    session.check()
    fill()
    return {
        "fits": True,
        "filled": filled,
        "tokens": session.length + session.config.generation_window,
        "cache_bytes": session.cache_bytes,
        "first_fill_seconds": middle - started,
        "first_window_seconds": ended - middle,
        "fill_seconds": time.perf_counter() - ended,
    }


def used_bytes(session: Session) -> int:
    """Returns the bytes of the valid keys and values in the cache, and of the states, on one device."""
    config = session.config
    kept = session.devices, session.cache_dtype
    cached = limits.cached_bytes(config, session.history, session.window, *kept)
    return int(session.batch * (cached + limits.state_bytes(config)))

"""The history split over the mesh's axis `context`: against the reference, one device, and the compiled traffic."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.test_exactness import TOLERANCE, compared, largest_error
from tests.support import golden
from tests.support.models import SMALL
from tlinformer_jax import ModelConfig, build_model
from tlinformer_jax.decoding import Generator, cache_bytes, context_mesh, history, windowed
from tlinformer_jax.decoding import cache as cache_module
from tlinformer_jax.decoding.context_parallel import on_devices
from tlinformer_jax.decoding.decoder import Decoder, step
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.interop import params_from_reference
from tlinformer_jax.models import cached_rows
from tlinformer_jax.parallel.sharding import SplitRows, build_mesh
from tools.collectives import Collective, collectives

# Windows of sizes that no number of devices divides.
ODD = dataclasses.replace(SMALL, history_window=7, generation_window=5, hidden_depth=0)
CASES = {
    "odd windows, eight devices": ({"history_window": 7, "generation_window": 5, "hidden_depth": 0}, 8),
    "odd windows, two devices": ({"history_window": 7, "generation_window": 5, "hidden_depth": 0}, 2),
    "one token a window": ({"history_window": 3, "generation_window": 1, "hidden_depth": 1, "key_taps": 3}, 8),
    "three blocks, three devices": ({"num_blocks": 3, "hidden_depth": 0, "key_taps": 1}, 3),
    "auto": ({"history_window": "auto", "generation_window": 5, "hidden_depth": 2}, 8),
    "causal history": (
        {
            "causal_history": True,
            "token_shift": True,
            "key_taps": 2,
            "num_blocks": 3,
            "history_window": 7,
            "generation_window": 5,
            "hidden_depth": 0,
        },
        3,
    ),
    "causal history, one token a window": (
        {"causal_history": True, "history_window": 3, "generation_window": 1, "hidden_depth": 0},
        8,
    ),
    "tconstformer": ({"architecture": "tconstformer", "history_window": 7, "generation_window": 5}, 8),
}

QUICK = "odd windows, two devices"


def make_decoder(config: ModelConfig, context: int) -> Decoder:
    variables = params_from_reference(golden.random_weights(config), config)
    return Decoder(build_model(config), variables, context_mesh(context))


def small_caches(monkeypatch, rows_per_token: int = 4) -> None:
    """Histories of several chunks and rounds on each device, caches that grow from eight rows a device on."""
    monkeypatch.setattr(cache_module, "CLASS_STEPS", (4, 5, 6))
    monkeypatch.setattr(cache_module, "SMALLEST_CLASS", 8)
    monkeypatch.setattr(cache_module, "CHUNK_ROWS", 8)
    monkeypatch.setattr(cache_module, "ROUNDS", 2)
    monkeypatch.setattr(history, "ROWS_PER_TOKEN", rows_per_token)


@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_every_logit_is_the_references(name):
    """Prompts around the window edges and longer than a window, each continued across three slides, in one batch."""
    changes, context = CASES[name]
    config = dataclasses.replace(SMALL, **changes)
    size = config.generation_window
    prompts = [size, 3 * size + 1] if name == QUICK else [max(size - 1, 1), size, size + 1, 1, 3 * size + 1]
    assert largest_error(make_decoder(config, context), prompts, 6 * size + 3) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_growing_caches_keep_every_row_in_its_place(causal, monkeypatch, own_traces):
    """Through at least two larger classes; every class is a program of its own, which is what this costs."""
    small_caches(monkeypatch)
    decoder = make_decoder(dataclasses.replace(ODD, causal_history=causal), 3)
    assert decoder.init_cache(2, 21).capacity * 1.2 < 61 - ODD.generation_window
    assert largest_error(decoder, [21, 2], 61, room=21) < TOLERANCE


@pytest.mark.slow
def test_tokens_and_probabilities_are_those_of_one_device(monkeypatch, own_traces):
    """Greedy, by the device loop, across slides and growing caches; prompts of unequal lengths."""
    small_caches(monkeypatch)
    model = build_model(ODD)
    variables = params_from_reference(golden.random_weights(ODD), ODD)
    prompts = [np.random.default_rng(n).integers(0, ODD.vocab_size, n).tolist() for n in (5, 61)]
    found = [
        Generator(model, variables, mesh=mesh).run(prompts, max_new_tokens=24, logprobs=True)
        for mesh in (
            None,
            context_mesh(8),
            build_mesh({"tensor": 2, "fsdp": 2, "context": 2}),
        )
    ]
    for other in found[1:]:
        for one, expected in zip(other, found[0], strict=True):
            assert one.tokens == expected.tokens
            assert one.slides == expected.slides
            np.testing.assert_allclose(one.logprobs, expected.logprobs, atol=1e-5)


def test_the_history_is_spread_from_its_birth_and_the_rest_is_whole():
    decoder = make_decoder(ODD, 8)
    cache = decoder.init_cache(1, 9000)
    for _ in range(2):
        assert cache.capacity % 8 == 0
        for array in jax.tree.leaves(cache.history):
            assert {shard.data.shape[-1] for shard in array.addressable_shards} == {cache.capacity // 8}
            assert len({shard.device for shard in array.addressable_shards}) == 8
        assert all(array.sharding.is_fully_replicated for array in jax.tree.leaves((cache.tokens, cache.context)))
        # Each is donated, so none may share memory with another.
        places = [leaf.addressable_data(0).unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache)]
        assert len(set(places)) == len(places)
        cache = decoder.grow(cache, cache.capacity + 100)
    sizes = cache_bytes(ODD, cache, [9000])
    assert sizes.devices == 8
    assert sizes.allocated == sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(cache))
    rows = -(-8995 // 8)  # of the device that has most
    assert sizes.parts["history"].used == rows * 2 * 16 * 4 * 2
    assert str(sizes).startswith("on each of 8 devices ")


def merge_without_weights(monkeypatch):
    """Every device's result counts alike."""

    def mean(output, lse, axis):
        if isinstance(axis, str):
            return jax.lax.pmean(output, axis), lse
        return output.mean(axis), lse.max(axis)

    for module in (history, cached_rows):
        monkeypatch.setattr(module, "merge_softmaxes", mean)


def contiguous_positions(monkeypatch):
    """Rows are turned as if each device had a run of the sequence."""
    monkeypatch.setattr(
        SplitRows, "positions", lambda self, start, count: start + jnp.arange(count) + self.index() * 64
    )


def wrong_count(monkeypatch):
    """Every device takes the rows' mean number for its own."""
    monkeypatch.setattr(SplitRows, "count", lambda self, length: jnp.asarray(length) // self.parts)


@pytest.mark.slow
@pytest.mark.parametrize("mutate", [merge_without_weights, contiguous_positions, wrong_count], ids=lambda m: m.__name__)
def test_mutations_are_caught(mutate, monkeypatch, own_traces):
    mutate(monkeypatch)
    error, _ = compared(make_decoder(dataclasses.replace(ODD, num_blocks=1), 2), [16], 22)
    assert error > 100 * TOLERANCE


def traffic(length: int, *names: str) -> dict[str, tuple[Collective, ...]]:
    """The collectives of functions of the decoder on eight devices, with a history of `length` tokens."""
    config = dataclasses.replace(ODD, history_window=32, generation_window=16, hidden_depth=1)
    decoder = make_decoder(config, 8)
    cache = decoder.init_cache(1, length + 17)
    assert cache.capacity >= length
    number = jax.ShapeDtypeStruct((), jnp.int32)
    prompt = jax.ShapeDtypeStruct(cache.tokens.shape[1:], jnp.int32)
    token, active = (jax.ShapeDtypeStruct((1,), dtype) for dtype in (jnp.int32, jnp.bool_))
    calls = {
        "slide": (windowed.slide, number, number),
        "step": (step, token, active),
        "prefill": (windowed.prefill, number, prompt, number, number),
    }

    def program(function, *arrays) -> str:
        return on_devices.lower(function, decoder.mesh, decoder.params, config, cache, *arrays).compile().as_text()

    return {name: collectives(program(*calls[name])) for name in names}


def same_traffic(*names: str) -> dict[str, tuple[Collective, ...]]:
    """Checks that collectives have the same shapes at 4,096 and at 32,768 tokens and run once; returns them."""
    short, long = traffic(4096, *names), traffic(32768, *names)
    for name in names:
        assert short[name], "the devices must tell each other something"
        assert [dataclasses.replace(one, name="") for one in short[name]] == [
            dataclasses.replace(one, name="") for one in long[name]
        ]
        assert all(one.known_trips and one.trips == 1 for one in long[name])
    return long


HEADS, WIDTH = 2, 8


def test_what_devices_tell_each_other_for_a_token_does_not_grow_with_the_history():
    (found,) = same_traffic("step").values()
    # Each of two blocks' history gives one result with its log-sum-exp, in one collective.
    assert [(one.kind, one.operands[0].bytes) for one in found] == [("all-gather", 4 * HEADS * (WIDTH + 1))] * 2


@pytest.mark.slow
def test_what_devices_tell_each_other_for_a_window_does_not_grow_with_the_history():
    found = same_traffic("slide", "prefill")
    for name, queries in (("slide", 32), ("prefill", 32 + 16)):  # the observed rows', and the window's
        # Of each of two blocks maxima, weights and weighted sums.
        assert sum(one.total_bytes for one in found[name]) == 2 * 4 * queries * HEADS * (WIDTH + 2)


@pytest.mark.slow
def test_the_gpu_kernels_on_each_device(interpreted_kernels):
    half = {"dtype": "float16", "attention": "auto", "d_model": 24, "hidden_depth": 0}
    config = dataclasses.replace(SMALL, history_window=40, generation_window=128, **half)
    assert largest_error(make_decoder(config, 2), [255, 128], 259) < 0.05
    stored = {"store_products", "store_tokens"}
    assert interpreted_kernels == {"attend_cached", "dense", "attend_history", "attend_context"} | stored


def test_mistakes_are_named():
    for context in (9, 0):
        with pytest.raises(ConfigError) as caught:
            context_mesh(context)
        allowed = "must be from 1 to the number of devices of this machine; there are 8 devices (cpu)"
        assert str(caught.value) == f"generation.context = {context}: {allowed}"
    with pytest.raises(
        ConfigError, match=r"generation\.context = 2: must be 1 for model\.architecture = 'transformer'"
    ):
        make_decoder(dataclasses.replace(SMALL, architecture="transformer", hidden_depth=0), 2)
    assert context_mesh(1) is None

"""The int8 cache: against an independent quantiser in NumPy, its error, its bytes, and what a program holds of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.test_context import small_caches
from tests.decoding.test_exactness import errors_of, make_decoder, truth
from tests.decoding.test_kernels import attend_history, in_int8, log_sum_exp, normal, softmax_attention, store
from tests.decoding.test_trained_bfloat16 import decoded_logits
from tests.support import golden, reference
from tests.support.commands import command
from tests.support.models import SMALL
from tlinformer_jax import ModelConfig, build_model
from tlinformer_jax.config.model import ARCHITECTURES
from tlinformer_jax.decoding import Generator, cache_bytes, context_mesh, history
from tlinformer_jax.decoding import cache as cache_module
from tlinformer_jax.decoding.cache import init_cache
from tlinformer_jax.decoding.context_parallel import on_devices
from tlinformer_jax.decoding.decoder import Decoder, step
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.interop import params_from_reference
from tlinformer_jax.kernels import key_value
from tlinformer_jax.kernels.key_value import KeyValue, quantised
from tlinformer_jax.models import cached_rows
from tlinformer_jax.models.cached_rows import CachedRows, attend_cached
from tlinformer_jax.models.rope import rope_table, rotate
from tlinformer_jax.training.checkpoint import load_run

# Several blocks read what the blocks before restored; windows slide five times.
CONFIG = dataclasses.replace(SMALL, hidden_depth=0, history_window=5)
LENGTH, PROMPTS = 27, [5, 13]
# Of logits whose standard deviation is about 1.
BOUND = 0.08


def integers_and_scales(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By the definition, of rows [..., d]: multiples of scales, which are largest / 127 with 8 bits, rounded up."""
    fraction, exponent = np.frexp(np.abs(rows).max(-1) / 127)
    scales = np.ldexp(np.ceil(fraction * 256) / 256, exponent)
    multiples = rows / np.where(scales > 0, scales, 1)[..., None]
    return np.sign(multiples) * np.floor(np.abs(multiples) + 0.5), scales


def kept(rows: np.ndarray) -> np.ndarray:
    integers, scales = integers_and_scales(rows)
    return integers * scales[..., None]


@functools.cache
def quantised_truth(config: ModelConfig, length: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """As `truth`, with history keys and values that have been quantised in NumPy."""
    tokens, _ = truth(config, length, batch)
    return tokens, reference.logits(golden.random_weights(config), config, tokens, kept=kept)


def int8_errors(decoder: Decoder, expected=truth, **options) -> np.ndarray:
    errors, in_place = errors_of(
        decoder, PROMPTS, *expected(decoder.config, LENGTH, len(PROMPTS)), cache_dtype="int8", **options
    )
    assert in_place
    return errors[np.isfinite(errors)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_rows_are_quantised_as_numpy_does(dtype):
    rows = np.random.default_rng(0).standard_normal((3, 12, 400)) * np.geomspace(1e-3, 1e3, 400)
    rows[:, :, 7] = 0
    rows[:, 3, 8] = 60_000  # one number far above the others
    rows = jnp.asarray(rows, dtype)
    integers, scales = (np.asarray(array, np.float64) for array in quantised(rows))
    exact = np.asarray(rows, np.float64)
    true_integers, true_scales = integers_and_scales(np.moveaxis(exact, 1, -1))
    np.testing.assert_array_equal(scales, true_scales)
    differs = np.abs(integers - np.moveaxis(true_integers, -1, 1))
    assert differs.max() <= 1  # a tie, in float32
    assert differs.mean() < 1e-4
    assert np.abs(integers).max() == 127
    assert (np.abs(integers * scales[:, None] - exact) <= 0.5001 * scales[:, None]).all()
    assert (integers[..., 7] == 0).all()


@pytest.mark.parametrize(
    ("changes", "rows_per_token"),
    [
        ({}, 4),
        pytest.param(
            {"longest_wavelength": 20, "token_shift": True, "key_taps": 2, "window_overlap": 2},
            0,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_logit_is_that_of_a_history_quantised_in_numpy(changes, rows_per_token, monkeypatch, own_traces):
    """Prefill, steps and slides; in chunks, in caches that grow."""
    monkeypatch.setattr(cache_module, "SMALLEST_CLASS", 16)
    monkeypatch.setattr(cache_module, "CHUNK_ROWS", 4)
    monkeypatch.setattr(cache_module, "ROUNDS", 2)
    monkeypatch.setattr(cached_rows, "INT8_ROWS", 8)
    monkeypatch.setattr(history, "ROWS_PER_TOKEN", rows_per_token)
    config = dataclasses.replace(CONFIG, **changes)
    errors = int8_errors(make_decoder(config), quantised_truth, room=13)
    # A number in the middle of two multiples may be rounded the other way in float32, which moves a few logits.
    assert np.median(errors) < 2e-5
    assert errors.max() < 0.02
    assert np.median(int8_errors(make_decoder(config), truth, room=13)) > 1e-3  # so the bound above means something


@pytest.mark.parametrize(
    "architecture",
    ["tlinformer", "transformer", pytest.param("gated_deltanet_hybrid", marks=pytest.mark.slow)],
)
def test_the_error_of_logits_is_small_and_does_not_grow_with_slides(architecture):
    config = dataclasses.replace(CONFIG, architecture=architecture)
    decoder = make_decoder(config)
    errors, in_place = errors_of(decoder, [5], *truth(config, 67, 1), cache_dtype="int8")
    errors = errors[np.isfinite(errors)]
    assert in_place
    print(f"{architecture}: largest {errors.max():.4f}, mean {errors.mean():.4f}")
    assert 1e-4 < errors.max() < BOUND
    # A slide makes the history anew from the tokens.
    assert errors[-16:].mean() < 2 * errors[4:20].mean()


def scales_of_keys_for_values(monkeypatch):
    real = KeyValue.as_kept

    def mutated(self, rows):
        new = real(self, rows)
        return dataclasses.replace(new, value_scale=new.key_scale)

    monkeypatch.setattr(KeyValue, "as_kept", mutated)


def scales_a_tenth_too_large(monkeypatch):
    real = key_value.quantised
    monkeypatch.setattr(
        key_value, "quantised", lambda numbers: (real(numbers)[0], (real(numbers)[1] * 1.1).astype(jnp.bfloat16))
    )


def scales_of_the_row_before(monkeypatch):
    real = KeyValue.as_kept

    def mutated(self, rows):
        new = real(self, rows)
        return new if new.key_scale is None else dataclasses.replace(new, key_scale=jnp.roll(new.key_scale, 1, -1))

    monkeypatch.setattr(KeyValue, "as_kept", mutated)


def cut_off(monkeypatch):
    """Not the nearest multiple, but the one towards 0."""
    monkeypatch.setattr(
        key_value, "to_integers", lambda numbers, scale: (numbers / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    )


@pytest.mark.parametrize(
    "mutate",
    [
        scales_of_keys_for_values,
        *(
            pytest.param(mutate, marks=pytest.mark.slow)
            for mutate in (scales_a_tenth_too_large, scales_of_the_row_before, cut_off)
        ),
    ],
    ids=lambda mutate: mutate.__name__,
)
def test_mutations_are_caught(mutate, monkeypatch, own_traces):
    mutate(monkeypatch)
    config = dataclasses.replace(CONFIG, num_blocks=1)
    assert np.median(int8_errors(make_decoder(config), quantised_truth)) > 1e-3


@pytest.mark.slow
def test_rows_spread_over_devices(monkeypatch, own_traces):
    small_caches(monkeypatch)
    config = dataclasses.replace(CONFIG, history_window=7, generation_window=5)
    variables = params_from_reference(golden.random_weights(config), config)
    decoder = Decoder(build_model(config), variables, context_mesh(8))
    errors = int8_errors(decoder, quantised_truth, room=13)
    assert np.median(errors) < 2e-5
    assert errors.max() < 0.02
    cache = decoder.init_cache(1, 9000, cache_dtype="int8")
    for array in jax.tree.leaves(cache.history):
        assert {shard.data.shape[-1] for shard in array.addressable_shards} == {cache.capacity // 8}
    sizes = cache_bytes(config, cache, [9000])
    assert sizes.allocated == sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(cache))
    assert str(sizes).startswith("int8, on each of 8 devices ")


@pytest.mark.slow
def test_unequal_prompts_together_are_each_alone():
    model, prompts = build_model(CONFIG), [np.arange(count) % 37 for count in (3, 8, 13)]
    generator = Generator(model, params_from_reference(golden.random_weights(CONFIG), CONFIG))
    options = {"max_new_tokens": 12, "logprobs": True, "cache_dtype": "int8"}
    together = generator.run(prompts, **options)
    for prompt, one in zip(prompts, together):
        (alone,) = generator.run([prompt], **options)
        assert one.tokens == alone.tokens
        np.testing.assert_allclose(one.logprobs, alone.logprobs, atol=1e-5)
    exact = generator.run(prompts, max_new_tokens=12, logprobs=True)
    gaps = np.abs(np.array([one.logprobs for one in together]) - [one.logprobs for one in exact])
    assert gaps.max() > 1e-5  # the option is not ignored


@pytest.mark.parametrize("architecture", ["tlinformer", "transformer"])
def test_bytes_are_those_of_its_arrays(architecture):
    config = dataclasses.replace(CONFIG, architecture=architecture, dtype="bfloat16")
    cache, exact = (init_cache(config, 2, 4096, cache_dtype=name) for name in ("int8", "auto"))
    sizes = cache_bytes(config, cache, [13, 9])
    assert sizes.allocated == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    part, tokens, layers = ("history", 12 + 8, 2) if config.windowed else ("layers", 13 + 9, 4)
    assert sizes.parts[part].used == tokens * layers * 2 * (16 + 2 * 2)  # key and value: D numbers, two heads' scales
    plain = cache_bytes(config, exact, [13, 9])
    assert sizes.parts[part].allocated * 2 * 16 == plain.parts[part].allocated * (16 + 2 * 2)
    assert sizes.paper * 2 == plain.paper
    assert str(sizes).startswith("int8, ")


def test_a_tokens_program_holds_no_converted_copy():
    """Not in memory, whatever a fusion does to a number on its way; float32 would take 4 bytes a number."""
    config, rows = dataclasses.replace(CONFIG, d_model=64, num_heads=2), 1 << 17
    decoder = make_decoder(config)
    cache = jax.eval_shape(lambda: init_cache(config, 1, rows, cache_dtype="int8"))
    token, active = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.bool_)
    compiled = on_devices.lower(step, None, decoder.params, config, cache, token, active).compile()
    one_copy = 4 * config.d_model * rows
    assert compiled.memory_analysis().temp_size_in_bytes < one_copy / 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_does_not_grow_has_no_int8_cache(architecture):
    config = dataclasses.replace(CONFIG, architecture=architecture)
    generator = Generator(build_model(config), params_from_reference(golden.random_weights(config), config))
    if architecture in ("tlinformer", "transformer", "gated_deltanet_hybrid"):
        generator.stream([[1, 2]], cache_dtype="int8")
        return
    with pytest.raises(ConfigError, match=r"generation\.cache_dtype = 'int8': needs a cache that grows"):
        generator.stream([[1, 2]], cache_dtype="int8")
    with pytest.raises(ConfigError, match=r"generation\.cache_dtype = 'int4': must be one of auto, int8"):
        generator.stream([[1, 2]], cache_dtype="int4")


RECALL = {
    "model": {
        "vocab_size": 32,
        "d_model": 32,
        "num_heads": 2,
        "num_blocks": 1,
        "hidden_depth": 0,
        "d_ff": 64,
        "history_window": 4,
        "generation_window": 4,
        "token_shift": True,
        "dtype": "float32",
    },
    "train": {
        "steps": "1500@0.98",
        "batch_size": 32,
        "warmup_steps": 50,
        "learning_rate": 1e-2,
        "eval_every": 200,
    },
    "data": {
        "dataset": "recall",
        "tokenizer": "numbers:32",
        "sequence_length": 24,
        "num_items": 4,
        "examples": 80_000,
    },
}


@pytest.mark.slow
@pytest.mark.long
def test_a_trained_model_recalls_as_much(tmp_path):
    """Four pairs in the first two windows, asked for over the four that follow."""
    file = tmp_path / "recall.py"
    file.write_text(
        "from tlinformer_jax.config.run import default_config_dict\n\ndef get_config():\n"
        f"    config = default_config_dict()\n    for name, fields in {RECALL!r}.items():\n"
        "        config[name].update(fields)\n    return config\n"
    )
    workdir = tmp_path / "run"
    result = command("tlinformer_jax.main", f"--config={file}", f"--workdir={workdir}", many_steps=True)
    assert result.returncode == 0, result.stderr
    trained = load_run(workdir)
    model = build_model(trained.run.config.model)
    decoder = Decoder(model, {"params": jax.device_get(trained.params)})
    samples = trained.run.split("test").task.make(np.arange(100), 24)
    right = {}
    for cache_dtype in ("auto", "int8"):
        chosen = decoded_logits(decoder, samples.tokens, 8, cache_dtype).argmax(-1)
        # The logits after position t are at t - 8, and the token after it is an answer where `answers` says so.
        right[cache_dtype] = chosen[:, :-1][samples.answers[:, 8:]] == samples.tokens[:, 9:][samples.answers[:, 8:]]
    print({name: float(found.mean()) for name, found in right.items()})
    assert right["auto"].size == 400
    assert right["auto"].mean() > 0.95
    assert right["int8"].mean() >= right["auto"].mean() - 0.01
    assert (right["int8"] == right["auto"]).mean() >= 0.99


# --- the GPU kernels, interpreted


def int8_cache(*shape: int, seed: int = 0) -> tuple[KeyValue, np.ndarray, np.ndarray]:
    """A cache, and its keys and values in float64."""
    cache = in_int8(KeyValue(normal(seed, *shape), normal(seed + 1, *shape)))
    pairs = (cache.key, cache.key_scale), (cache.value, cache.value_scale)
    return cache, *(
        np.asarray(whole, np.float64) * np.asarray(scale, np.float64)[..., None, :] for whole, scale in pairs
    )


@pytest.mark.parametrize(("queries", "width", "length"), [(70, 12, 1300), (64, 36, 1), (9, 24, 1536), (4, 8, 0)])
def test_attend_history(queries, width, length):
    cache, key, value = int8_cache(2, 2, width, 1536)
    query = normal(5, queries, 2, width + 4)
    read, lse = attend_history(query, cache, jnp.int32(1), jnp.int32(length), 0.3)
    if not length:
        assert (np.asarray(read) == 0).all()
        assert (np.asarray(lse) == -np.inf).all()
        return
    exact = query[..., :width], key[1, ..., :length]
    np.testing.assert_allclose(read, softmax_attention(*exact, value[1, ..., :length], 0.3), atol=2e-5)
    np.testing.assert_allclose(lse, log_sum_exp(*exact, 0.3), atol=2e-5)


@pytest.mark.parametrize("chunk", [4096, 256])
def test_a_token_by_plain_products(chunk, monkeypatch):
    monkeypatch.setattr(cached_rows, "INT8_ROWS", chunk)
    cache, key, value = int8_cache(3, 2, 12, 1536)
    lengths, query, own = [1536, 1, 700], normal(5, 3, 2, 12), KeyValue(normal(6, 3, 2, 12), normal(7, 3, 2, 12))
    rows = CachedRows(cache, jnp.asarray(lengths, jnp.int32))
    (read,), _ = attend_cached(query, own, rows, None, 0.3)
    for row, length in enumerate(lengths):
        keys, values = (
            np.concatenate([array[row, ..., :length], np.asarray(new[row], np.float64)[..., None]], axis=-1)
            for array, new in ((key, own.key), (value, own.value))
        )
        np.testing.assert_allclose(read[row], softmax_attention(query[row][None], keys, values, 0.3)[0], atol=2e-5)
    (alone, read), _ = attend_cached(query, own, CachedRows(cache, jnp.zeros(3, jnp.int32)), rows, 0.3)
    far = softmax_attention(query[2][None], key[2, ..., :700], value[2, ..., :700], 0.3)[0]
    np.testing.assert_allclose(alone[2], own.value[2], atol=2e-5)
    np.testing.assert_allclose(read[2], far, atol=2e-5)


@pytest.mark.parametrize("width", [12, 36])
def test_store_quantises_what_it_writes_and_touches_nothing_else(width):
    cache, _, _ = int8_cache(2, 3, width, 512)
    projected, bias = normal(2, 128, 2, 3, width + 4), normal(3, 2, 3, width + 4)
    rope = rope_table(1_000_000 + jnp.arange(128), width)
    new = store(cache, projected, bias, (rope.cos, rope.sin), jnp.int32(1), jnp.int32(200))
    biased = projected[..., :width] + bias[..., :width]
    true_key = rotate(biased[None, :, 0], rope)[0]
    parts = (
        (new.key, new.key_scale, cache.key, cache.key_scale, true_key),
        (*(new.value, new.value_scale, cache.value, cache.value_scale, biased[:, 1]),),
    )
    for integers, scales, old, old_scales, rows in parts:
        true_integers, true_scales = integers_and_scales(np.asarray(rows, np.float64))
        expected, expected_scales = np.array(old), np.array(old_scales, np.float64)
        expected[1, :, :, 200:328] = np.moveaxis(true_integers, 0, -1)
        expected_scales[1, :, 200:328] = true_scales.T
        assert np.abs(integers.astype(np.int32) - expected.astype(np.int32)).max() <= 1
        assert (np.asarray(integers) != expected).mean() < 1e-3
        np.testing.assert_allclose(np.asarray(scales, np.float64), expected_scales, rtol=2**-7)
        assert (np.asarray(scales, np.float64) != expected_scales).mean() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "context", "rows_per_token"),
    [("tlinformer", 1, 0), ("tlinformer", 2, 4), ("transformer", 1, 4)],
)
def test_the_gpu_kernels_in_the_decoder(architecture, context, rows_per_token, monkeypatch, interpreted_kernels):
    """In half precision; a device writes 64 rows a slide, as many as the storing kernel takes."""
    monkeypatch.setattr(history, "ROWS_PER_TOKEN", rows_per_token)
    half = {"dtype": "float16", "attention": "auto", "d_model": 24, "hidden_depth": 0}
    windows = {"history_window": 40, "generation_window": 64 * context}
    config = dataclasses.replace(SMALL, architecture=architecture, **windows, **half)
    variables = params_from_reference(golden.random_weights(config), config)
    decoder = Decoder(build_model(config), variables, context_mesh(context))
    size = config.generation_window
    prompts, length = [2 * size - 1, size], 2 * size + 3
    expected = quantised_truth if architecture == "tlinformer" else truth
    errors, _ = errors_of(decoder, prompts, *expected(config, length, 2), cache_dtype="int8")
    # float16 keeps 11 bits; the logits' largest is about 4.
    assert np.nanmax(errors) < (0.05 if architecture == "tlinformer" else BOUND)
    wanted = {"attend_cached", "dense"}
    if architecture == "tlinformer":
        wanted |= {"attend_history", "attend_context", "store_history"}
    assert interpreted_kernels == wanted

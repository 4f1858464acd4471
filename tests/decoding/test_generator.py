"""The generator: batches of unequal prompts, against the NumPy reference, against golden values, against each alone."""

import collections
import dataclasses
import functools
import gc

import jax
import numpy as np
import pytest

from tests.support import golden, models, reference
from tlinformer_jax import ModelConfig, build_model
from tlinformer_jax.config.model import ARCHITECTURES, RECURRENT
from tlinformer_jax.data.tokenizers import ByteTokenizer
from tlinformer_jax.decoding import Generation, Generator, cache_bytes, decoder, windowed
from tlinformer_jax.decoding import cache as cache_module
from tlinformer_jax.decoding.cache import history_of
from tlinformer_jax.decoding.sampling import GenerationConfig, sample, seen_tokens, sequence_keys
from tlinformer_jax.errors import UserError
from tlinformer_jax.interop import params_from_reference

SMALL = dataclasses.replace(models.SMALL, hidden_depth=0)
TEXT = dataclasses.replace(SMALL, vocab_size=260, num_blocks=1)
# Of several phases: a full window, one token in the window, no history.
LENGTHS = (3, 8, 13)
NEW = 12
DRAWN = {"temperature": 1.2, "repetition_penalty": 1.3, "seed": 5}


def weights(config: ModelConfig) -> dict[str, np.ndarray]:
    return golden.random_weights(config)


def prompts_of(config: ModelConfig, lengths=LENGTHS) -> list[list[int]]:
    return [np.random.default_rng(n).integers(0, config.vocab_size, n).tolist() for n in lengths]


@functools.cache
def generator(config: ModelConfig) -> Generator:
    tokenizer = ByteTokenizer() if config.vocab_size >= 257 else None
    return Generator(build_model(config), params_from_reference(weights(config), config), tokenizer)


def text_of(tokens) -> str:
    """The text of byte tokens, an incomplete last character left out."""
    data = ByteTokenizer().decode(tokens)
    for start in range(max(len(data) - 3, 0), len(data)):
        try:
            data[start:].decode("utf-8")
        except UnicodeDecodeError as error:
            if error.start == 0 and error.reason == "unexpected end of data":
                return data[:start].decode("utf-8", "replace")
    return data.decode("utf-8", "replace")


def of(architecture: str) -> ModelConfig:
    """Two blocks where the second reads what the first restored, else one: they compile sooner."""
    return dataclasses.replace(SMALL, architecture=architecture, num_blocks=2 if architecture == "tlinformer" else 1)


@functools.cache
def greedy(config: ModelConfig) -> list[Generation]:
    return generator(config).run(prompts_of(config), max_new_tokens=NEW, logprobs=True)


@pytest.mark.skipif(not golden.available(), reason=f"no golden files in {golden.FOLDER}")
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("tlin_small", "base_small") else pytest.param(name, marks=pytest.mark.slow)
        for name in golden.NAMES
    ],
)
def test_greedy_continuations_are_the_published_models(name):
    truth = golden.load(name)
    model = Generator(build_model(truth.config), params_from_reference(truth.params, truth.config))
    prompts, wanted = np.split(truth.greedy, [truth.prompt_length], axis=1)
    assert model.generate_tokens(list(prompts), max_new_tokens=wanted.shape[1]) == wanted.tolist()


def check_against_reference(config: ModelConfig, prompts, generations) -> None:
    """Every token is the likeliest of the reference's, and has its log-probability."""
    for prompt, generation in zip(prompts, generations):
        logits = reference.logits(weights(config), config, [prompt + generation.tokens])[0][len(prompt) - 1 : -1]
        assert generation.tokens == logits.argmax(-1).tolist()
        logprobs = logits.max(-1) - np.log(np.exp(logits).sum(-1))
        np.testing.assert_allclose(generation.logprobs, logprobs, atol=3e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_unequal_prompts_continue_as_the_reference_says(architecture):
    config = of(architecture)
    prompts = prompts_of(config)
    generations = greedy(config)
    check_against_reference(config, prompts, generations)
    assert {generation.finish_reason for generation in generations} == {"length"}
    for prompt, generation in zip(prompts, generations):
        fed = len(prompt) + NEW - 1  # nobody needs what comes after the last token
        slides = (history_of(config, fed) - history_of(config, len(prompt))) // config.generation_window
        assert (generation.hits, generation.slides) == (NEW - 1, slides * config.windowed)


@pytest.mark.parametrize(("architecture", "lengths"), [("tlinformer", (6, 16)), ("transformer", (6, 14))])
def test_batches_keep_their_history_when_the_cache_grows(architecture, lengths, monkeypatch):
    monkeypatch.setattr(cache_module, "SMALLEST_CLASS", 16)
    config = of(architecture)
    prompts = prompts_of(config, lengths)
    stream = generator(config).stream(prompts, max_new_tokens=8, logprobs=True, chunk=3)
    first = next(stream)
    before = stream.cache_bytes.allocated
    pieces = [first, *stream]
    assert stream.cache_bytes.allocated > before
    check_against_reference(config, prompts, stream.generations)
    assert {len(piece.tokens) for piece in pieces} <= {1, 2, 3}
    assert {piece.index for piece in pieces} == {0, 1}


@functools.cache
def drawn(config: ModelConfig) -> list[list[int]]:
    return generator(config).generate_tokens(prompts_of(config), max_new_tokens=NEW, **DRAWN)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_drawn_in_a_batch_are_those_of_the_reference_alone(architecture):
    config = of(architecture)
    sampling = GenerationConfig(**DRAWN)
    jit_sample = jax.jit(sample)
    for i, (prompt, tokens) in enumerate(zip(prompts_of(config), drawn(config))):
        logits = reference.logits(weights(config), config, [prompt + tokens])[0][len(prompt) - 1 : -1]
        seen = np.stack([seen_tokens([prompt + tokens[:number]], config.vocab_size)[0] for number in range(NEW)])
        keys = sequence_keys([DRAWN["seed"] + i] * NEW, NEW)
        positions = np.arange(len(prompt), len(prompt) + NEW, dtype=np.int32)
        wanted, _ = jit_sample(logits.astype(np.float32), keys, positions, seen, sampling.sampler())
        assert tokens == wanted.tolist()
    assert drawn(config) != [generation.tokens for generation in greedy(config)]


def test_a_drawn_sequence_does_not_depend_on_neighbours_place_or_calls():
    config = of("tlinformer")
    model, prompts = generator(config), prompts_of(config)
    seeds = [DRAWN["seed"] + i for i in range(3)]
    turned = model.generate_tokens(prompts[::-1], max_new_tokens=NEW, chunk=3, **(DRAWN | {"seed": seeds[::-1]}))
    assert turned[::-1] == drawn(config)
    alone = [
        model.generate_tokens([prompt], max_new_tokens=NEW, **(DRAWN | {"seed": seed}))[0]
        for prompt, seed in zip(prompts, seeds)
    ]
    assert alone == drawn(config)


def test_samples_of_one_prompt_differ():
    config = of("tlinformer")
    samples = generator(config).generate_tokens(prompts_of(config)[:1] * 3, max_new_tokens=NEW, **DRAWN)
    assert len({tuple(sample) for sample in samples}) == 3
    assert samples[0] == drawn(config)[0]


@pytest.mark.parametrize("architecture", ["tlinformer", "transformer"])
def test_stop_tokens_end_their_sequence_only(architecture):
    """Between two slides and, of a baseline, in the middle of a single call of the device."""
    config = of(architecture)
    full = drawn(config)
    stop = next(token for i, token in enumerate(full[1]) if i >= 4 and token not in [*full[0], *full[1][:i]])
    unused = [token for token in range(config.vocab_size) if not any(token in tokens for tokens in full)]
    generations = generator(config).run(
        prompts_of(config), max_new_tokens=NEW, stop_tokens=[stop, *unused[:2]], logprobs=True, **DRAWN
    )
    for got, wanted in zip(generations, full):
        assert got.tokens == (wanted[: wanted.index(stop) + 1] if stop in wanted else wanted)
        assert len(got.logprobs) == len(got.tokens)
        assert got.finish_reason == ("stop_token" if stop in wanted else "length")
    assert 5 <= len(generations[1].tokens) < NEW
    assert generations[0].finish_reason == "length"


def test_logits_that_are_not_finite_end_in_one_clear_line():
    config = of("tlinformer")
    variables = params_from_reference(weights(config), config)
    variables["params"]["norm_bias"] = variables["params"]["norm_bias"].at[0].set(np.nan)
    broken = Generator(build_model(config), variables)
    with pytest.raises(UserError, match="sequence 0: the model's logits are not finite at position 3, so no token"):
        broken.run(prompts_of(config), max_new_tokens=2, logprobs=True)
    model = Generator(build_model(config), params_from_reference(weights(config), config))
    stream = model.stream(prompts_of(config), max_new_tokens=NEW, logprobs=True)
    next(stream)
    model.decoder.params = jax.tree.map(lambda array: array * np.nan, model.decoder.params)
    with pytest.raises(UserError, match="sequence 0: the model's logits are not finite at position 4"):
        list(stream)


def test_ctrl_c_keeps_what_there_is(monkeypatch):
    model, texts = generator(TEXT), ["begin", "other"]
    options = {"max_new_tokens": 30, "temperature": 1.0, "chunk": 2}
    full, _ = model.run(texts, **options)
    calls, run_steps = [], decoder.Decoder.run_steps

    def interrupted(self, cache, *arguments):
        calls.append(arguments)
        if len(calls) % 4 == 0:
            raise KeyboardInterrupt
        return run_steps(self, cache, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(decoder.Decoder, "run_steps", interrupted)
        part, other = model.run(texts, **options)
        with pytest.raises(KeyboardInterrupt):
            model.generate(texts, **options)
    assert part.finish_reason == other.finish_reason == "interrupted"
    assert 4 <= len(part.tokens) < 30
    assert part.tokens == full.tokens[: len(part.tokens)]
    assert part.text == text_of(part.tokens)
    # A stream's consumer may be the one who is interrupted; what was held back for a stop string still comes.
    stream = model.stream(texts, stop_strings=[full.text[:3] + "\0"], **options)
    shown = next(stream).text
    rest = stream.stop()
    assert {piece.index for piece in rest} == {0, 1}
    assert shown + "".join(piece.text for piece in rest if piece.index == 0) == stream.generations[0].text
    assert list(stream) == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cache_bytes_are_those_of_its_arrays(architecture):
    config = of(architecture)
    decoder = generator(config).decoder
    cache = decoder.init_cache(3, 13)
    for row, prompt in enumerate(prompts_of(config)):
        cache, _ = decoder.prefill(cache, row, np.array(prompt))
    sizes = cache_bytes(config, cache, LENGTHS)
    assert sizes.allocated == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    np.testing.assert_array_equal(cache.position, LENGTHS)
    row = 2 * 16 * 4  # key and value, D, float32
    if architecture == "transformer":
        assert sizes.parts["layers"].used == sizes.paper == 24 * row * 2
        return
    if architecture == "sliding_window":
        assert sizes.parts["layers"].used == (3 + 8 + 9) * row * 2
        assert sizes.paper is None
        return
    if architecture in RECURRENT:  # two layers, of the hybrid one with a state: two heads, 8 by 8, and three inputs
        recurrent = 1 if architecture == "gated_deltanet_hybrid" else 2
        assert sizes.parts["layers"].used == 24 * row * (2 - recurrent)
        assert sizes.paper == (24 * row if recurrent == 1 else None)
        assert sizes.parts["state"].used == recurrent * 3 * 4 * (2 * 8 * 8 + 3 * 3 * 16)
        return
    blocks, lengths = config.num_blocks, (cache.history_length, cache.observed_length, cache.window_length)
    assert [array.tolist() for array in lengths] == [[0, 4, 12], [0, 4, 6], [3, 4, 1]]
    assert sizes.parts["context"].used == 10 * row * blocks
    assert sizes.parts["window"].used == 8 * row * 2 * blocks
    assert sizes.parts["tokens"].used == 24 * 4
    if architecture == "tconstformer":
        assert sizes.parts["history"].allocated == 0
        assert sizes.paper is None
        return
    # Equation 7, 2 * batch * N * D * bytes * layers / (H + 2), counts the window's tokens as history.
    assert sizes.paper == 2 * 24 * 16 * 4 * 4 // 2
    assert sizes.parts["history"].used * 24 == sizes.paper * 16


def live_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays() if not array.is_deleted())


@pytest.mark.parametrize("how", ["dropped", "ended", "stopped"])
def test_a_stream_frees_its_cache_when_it_is_done(how):
    """At once, not when Python collects cycles: on a GPU a cache has gigabytes."""
    config = of("tlinformer")
    model = generator(config)
    gc.collect()
    gc.disable()
    before = live_bytes()
    try:
        stream = model.stream(prompts_of(config, (17, 20, 26)), max_new_tokens=6, chunk=2)
        next(stream)
        allocated = stream.cache_bytes.allocated
        assert live_bytes() - before >= allocated
        if how == "dropped":
            del stream
        elif how == "stopped":
            stream.stop()
        else:
            while None in [generation.finish_reason for generation in stream.generations]:
                next(stream)
        assert live_bytes() - before < allocated / 2
    finally:
        gc.enable()


def test_nothing_asked_for_nothing_done():
    model = generator(of("tlinformer"))
    assert model.generate_tokens([], max_new_tokens=3) == []
    stream = model.stream(prompts_of(SMALL), max_new_tokens=0)
    assert list(stream) == []
    assert [(g.tokens, g.finish_reason, g.slides) for g in stream.generations] == [([], "length", 0)] * 3
    assert stream.cache_bytes.allocated == 0


MISTAKES = {
    "empty prompt": (
        [[1], []],
        {},
        "prompt 1: must be a text, if there is a tokenizer, or a list of one or more token ids from 0 to 36",
    ),
    "id too large": (
        [[1], [2, 37]],
        {},
        "prompt 1: must be a text, if there is a tokenizer, or a list of one or more token ids from 0 to 36",
    ),
    "negative id": ([[-1]], {}, "prompt 0: must be a text, if there is a tokenizer, or a list"),
    "no ids": ([[1.5]], {}, "prompt 0: must be a text, if there is a tokenizer, or a list"),
    "nested": ([[[1], [2, 3]]], {}, "prompt 0: must be a text, if there is a tokenizer, or a list"),
    "one prompt": ("text", {}, "prompts: must be a list of texts"),
    "text without tokenizer": (
        ["text"],
        {},
        "prompt 0: must be a text, if there is a tokenizer, or a list of one or more token ids from 0 to 36",
    ),
    "negative count": ([[1]], {"max_new_tokens": -1}, "generation.max_new_tokens = -1: must be an integer >= 0"),
    "no count": ([[1]], {"max_new_tokens": 1.0}, "generation.max_new_tokens = 1.0"),
    "temperature": ([[1]], {"temperature": -0.5}, "generation.temperature = -0.5"),
    "top_k": ([[1]], {"top_k": 0}, "generation.top_k = 0"),
    "seed": ([[1]], {"seed": -3}, "generation.seed = -3"),
    "seeds": ([[1]], {"seed": [1, 2]}, "generation.seed = [1, 2]: must be one integer or 1 of them"),
    "unknown option": (
        [[1]],
        {"temprature": 1},
        "generation.temprature = 1: no such option; the options are cache_dtype, chunk, logprobs",
    ),
    "chunk": ([[1]], {"chunk": 0}, "generation.chunk = 0: must be an integer from 1 to 256"),
    "stop token": (
        [[1]],
        {"stop_tokens": [37]},
        "generation.stop_tokens = [37]: must be ids of the vocabulary, 0 .. 36",
    ),
    "no token of any model": (
        [[1]],
        {"stop_tokens": [2**31 - 1]},
        "generation.stop_tokens = [2147483647]: must be a list of token ids",
    ),
    "stop tokens": ([[1]], {"stop_tokens": "a"}, "generation.stop_tokens = 'a': must be a list of token ids"),
    "stop text": ([[1]], {"stop_strings": "a"}, "generation.stop_strings = 'a': must be a list of texts"),
    "empty stop": ([[1]], {"stop_strings": [""]}, "generation.stop_strings = ['']: must be a list of texts"),
    "stop without tokenizer": ([[1]], {"stop_strings": ["a"]}, "because the generator has no tokenizer"),
    "logprobs": ([[1]], {"logprobs": 1}, "generation.logprobs = 1: must be True or False"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    prompts, options, message = MISTAKES[name]
    with pytest.raises(UserError) as caught:
        generator(SMALL).generate_tokens(prompts, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [1500, pytest.param(12_000, marks=pytest.mark.slow)])
def test_few_compilations_for_thousands_of_tokens(count, monkeypatch):
    traces = collections.Counter()

    def count_traces(module, name):
        def traced(*arguments):
            traces[name] += 1
            return real(*arguments)

        real = getattr(module, name)
        monkeypatch.setattr(module, name, traced)

    count_traces(decoder, "run_steps")
    count_traces(windowed, "slide")
    config = dataclasses.replace(SMALL, num_blocks=1, d_model=8, d_ff=8, history_window=32, generation_window=32)
    model = Generator(build_model(config), params_from_reference(weights(config), config))
    stream = model.stream([[1]], max_new_tokens=count, chunk=256)
    drawn = sum(len(piece.tokens) for piece in stream)
    assert drawn == count
    assert stream.generations[0].slides == (count - 1) // 32
    assert 2 <= traces["run_steps"] <= 2 * np.log2(count) + 4
    assert 2 <= traces["slide"] <= 2 * np.log2(count) + 4

"""The choice of tokens: each filter against plain NumPy, frequencies of draws, independence of the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlinformer_jax.decoding.sampling import (
    GenerationConfig,
    Sampler,
    filtered,
    mark_seen,
    penalised,
    sample,
    seen_tokens,
    sequence_keys,
)
from tlinformer_jax.errors import ConfigError

V = 12
DRAWS = 20_000

jit_sample = jax.jit(sample)
jit_filter = jax.jit(lambda logits, seen, sampler: filtered(penalised(logits, seen, sampler), sampler))


def some_logits(batch: int, seed: int = 0, ties: bool = False) -> np.ndarray:
    """[batch, V]; with `ties`, of three values only."""
    rng = np.random.default_rng(seed)
    return (rng.integers(-1, 2, (batch, V)) if ties else 2 * rng.normal(size=(batch, V))).astype(np.float32)


def some_seen(batch: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random((batch, V)) < 0.4


def reference_row(logits: np.ndarray, seen: np.ndarray, config: GenerationConfig) -> np.ndarray:
    """Probabilities [V] after all filters, float64, by sets of token ids."""
    scores = [float(x) for x in logits]
    for token in np.flatnonzero(seen):
        scores[token] *= config.repetition_penalty if scores[token] < 0 else 1 / config.repetition_penalty
    weights = np.exp((np.array(scores) - max(scores)) / config.temperature)
    order = sorted(range(V), key=lambda token: (-scores[token], token))
    stay = order[: config.top_k or V]
    if config.top_p is not None:
        total, mass, nucleus = weights[stay].sum(), 0.0, []
        for token in stay:
            nucleus.append(token)
            mass += weights[token] / total
            if mass >= config.top_p - 1e-9:
                break
        stay = nucleus
    stay = [token for token in stay if weights[token] >= (config.min_p or 0.0) * weights.max()]
    result = np.zeros(V)
    result[stay] = weights[stay] / weights[stay].sum()
    return result


def run(config: GenerationConfig, logits, keys=None, positions=None, seen=None, logprobs=False):
    """`sample` jitted, as NumPy arrays."""
    batch = len(logits)
    keys = sequence_keys(config.seed, batch) if keys is None else keys
    positions = np.zeros(batch, np.int32) if positions is None else positions
    tokens, chosen = jit_sample(logits, keys, positions, seen, dataclasses.replace(config, logprobs=logprobs).sampler())
    return np.asarray(tokens), None if chosen is None else np.asarray(chosen)


FILTERS = {
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_k of one": {"top_k": 1},
    "top_k beyond V": {"top_k": V + 5},
    "top_p": {"top_p": 0.7},
    "tiny top_p": {"top_p": 1e-9},
    "min_p": {"min_p": 0.15},
    "min_p of one": {"min_p": 1.0},
    "penalty": {"repetition_penalty": 1.7},
    "encouragement": {"repetition_penalty": 0.5},
    "top_k and top_p": {"top_k": 6, "top_p": 0.75, "temperature": 1.4},
    "top_p and min_p": {"top_p": 0.95, "min_p": 0.1, "temperature": 2.0},
    "top_k and min_p": {"top_k": 5, "min_p": 0.2},
    "all": {"temperature": 1.3, "top_k": 7, "top_p": 0.85, "min_p": 0.12, "repetition_penalty": 1.3},
}
ALL = GenerationConfig(**FILTERS["all"])


@pytest.mark.parametrize("name", FILTERS)
def test_filters_leave_the_distribution_of_the_numpy_implementation(name):
    config = GenerationConfig(**({"temperature": 1.0} | FILTERS[name]))
    for ties in (False, True):
        logits, seen = some_logits(64, ties=ties), some_seen(64)
        logits[::5, ::3] = -np.inf
        got = np.asarray(jit_filter(logits, seen, config.sampler()), np.float64)
        want = np.stack([reference_row(*row, config) for row in zip(logits, seen)])
        np.testing.assert_array_equal(got.max(-1), 0.0)
        np.testing.assert_array_equal(np.exp(got) > 0, want > 0)
        np.testing.assert_allclose(np.exp(got) / np.exp(got).sum(-1, keepdims=True), want, atol=2e-6)


@pytest.mark.parametrize(
    ("settings", "logits", "stay"),
    [
        ({"top_k": 3}, [0, 1, 0, 1, 1, 1], [1, 3, 4]),
        ({"top_k": 3}, [0, 2, 0, 0, 0, 0], [0, 1, 2]),
        ({"top_p": 0.5}, [0] * 8, [0, 1, 2, 3]),
        ({"top_p": 0.51}, [0] * 8, [0, 1, 2, 3, 4]),
        ({"top_p": 0.5}, [0, 0, 0, 0, 0, 0, 200, 200], [6]),
        ({"top_k": 4, "top_p": 0.5}, [0] * 8, [0, 1]),
        ({"min_p": 1.0}, [1, 0, 1, 0], [0, 2]),
        ({"top_p": 1.0}, [0, -80, -80, 0], [0, 1, 2, 3]),
        ({"top_k": 3}, [0, -np.inf, -np.inf, 0], [0, 3]),
    ],
)
def test_borders_and_ties_by_hand(settings, logits, stay):
    config = GenerationConfig(temperature=1.0, **settings)
    got = jit_filter(np.array([logits], np.float32), None, config.sampler())
    assert np.flatnonzero(np.isfinite(got[0])).tolist() == stay


def test_penalty_divides_positive_and_multiplies_negative_logits():
    config = GenerationConfig(temperature=1.0, repetition_penalty=2.0)
    logits, seen = np.float32([[5, 4, -1, -1]]), np.array([[False, True, True, False]])
    got = jit_filter(logits, seen, config.sampler())
    np.testing.assert_allclose(got, np.float32([[5, 2, -2, -1]]) - 5)
    greedy = GenerationConfig(repetition_penalty=2.0)
    logits = np.float32([[3, 4, -1, -1], [-2, -1, -9, -1.5]])
    seen = np.array([[False, True, False, False], [False, True, False, False]])
    assert run(greedy, logits, seen=seen)[0].tolist() == [0, 3]
    with pytest.raises(ValueError, match="mask of seen tokens"):
        run(greedy, logits)


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "penalty", "all"])
@pytest.mark.parametrize("vary", ["keys", "positions"])
def test_frequencies_of_draws_are_those_of_the_filtered_distribution(name, vary):
    config = GenerationConfig(**({"temperature": 1.0} | FILTERS[name]))
    logits, seen = some_logits(1, seed=5), some_seen(1)
    numbers = np.arange(DRAWS, dtype=np.int32)
    keys = sequence_keys(0, DRAWS) if vary == "keys" else jnp.broadcast_to(sequence_keys(0, 1), (DRAWS,))
    positions = numbers if vary == "positions" else np.zeros_like(numbers)
    tokens, _ = run(config, np.repeat(logits, DRAWS, 0), keys, positions, np.repeat(seen, DRAWS, 0))
    counts, want = np.bincount(tokens, minlength=V), reference_row(logits[0], seen[0], config) * DRAWS
    assert not counts[want == 0].any()
    likely = want > 0
    chi_square = np.sum((counts[likely] - want[likely]) ** 2 / want[likely])
    freedom = likely.sum() - 1
    assert freedom >= 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom) + 4  # about one chance in 10^4, and the seeds are fixed


def test_a_draw_does_not_depend_on_neighbours_place_or_batch_size():
    logits, seen, keys = some_logits(9), some_seen(9), sequence_keys(3, 9)
    positions = np.arange(9, dtype=np.int32) * 7
    together, chosen = run(ALL, logits, keys, positions, seen, logprobs=True)
    assert len(set(together.tolist())) > 3
    order = np.random.default_rng(0).permutation(9)
    shuffled, _ = run(ALL, logits[order], keys[order], positions[order], seen[order])
    np.testing.assert_array_equal(shuffled, together[order])
    for row in range(9):
        one = slice(row, row + 1)
        alone, score = run(ALL, logits[one], keys[one], positions[one], seen[one], logprobs=True)
        assert (alone[0], score[0]) == (together[row], pytest.approx(chosen[row], abs=1e-6))
    broken = logits.copy()
    broken[4] = np.nan
    others = np.arange(9) != 4
    np.testing.assert_array_equal(run(ALL, broken, keys, positions, seen)[0][others], together[others])


def test_equal_logits_draw_different_tokens_by_seed_and_position():
    config, logits = GenerationConfig(temperature=1.0), np.zeros((200, V), np.float32)
    keys = sequence_keys(0, 200)
    first = run(config, logits, keys)[0]
    np.testing.assert_array_equal(first, run(config, logits, keys)[0])
    assert np.mean(first == run(config, logits, keys, np.ones(200, np.int32))[0]) < 0.25
    assert np.mean(first == run(config, logits, sequence_keys(1000, 200))[0]) < 0.25


def test_noise_belongs_to_token_ids_so_that_rounding_and_filters_change_few_draws():
    logits = np.repeat(some_logits(1), 500, 0)
    keys = sequence_keys(0, 500)
    free = run(GenerationConfig(temperature=1.0), logits, keys)[0]
    narrow = run(GenerationConfig(temperature=1.0, top_k=4), logits, keys)[0]
    kept = np.isin(free, np.argsort(-logits[0])[:4])
    assert 0 < kept.sum() < 500
    np.testing.assert_array_equal(narrow[kept], free[kept])
    # The same by rank: tokens all but equal, ordered one way and the other.
    slope = np.repeat(1e-6 * np.arange(V, dtype=np.float32)[None], 500, 0)
    config = GenerationConfig(temperature=1.0, top_k=V - 1, top_p=0.999)
    one, other = run(config, slope, keys)[0], run(config, -slope, keys)[0]
    inner = (one % (V - 1) > 0) & (other % (V - 1) > 0)  # filters leave out the first or the last
    assert inner.sum() > 300
    assert np.mean(one[inner] == other[inner]) > 0.99


def test_greedy_is_argmax_with_the_lowest_of_equal_ids():
    logits = np.concatenate([some_logits(20), some_logits(20, ties=True)])
    assert any(np.sum(row == row.max()) > 1 for row in logits)
    tokens, chosen = run(GenerationConfig(top_k=2, top_p=0.5, min_p=0.5), logits)
    assert (tokens.dtype, chosen) == (np.int32, None)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    # A temperature so low that logits overflow is greedy as well.
    np.testing.assert_array_equal(run(GenerationConfig(temperature=1e-30), logits[:20])[0], logits[:20].argmax(-1))


@pytest.mark.parametrize("config", [GenerationConfig(), ALL, GenerationConfig(temperature=1.0)])
def test_log_probabilities_are_of_the_models_own_distribution(config):
    logits = some_logits(30)
    tokens, chosen = run(config, logits, seen=some_seen(30), logprobs=True)
    exact = logits.astype(np.float64)
    want = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    assert chosen.dtype == np.float32
    np.testing.assert_allclose(chosen, want[np.arange(30), tokens], atol=2e-6)


@pytest.mark.parametrize("config", [GenerationConfig(), GenerationConfig(temperature=1.0), ALL])
def test_rows_without_a_distribution_give_minus_one(config):
    logits = some_logits(5)
    logits[0, 3] = np.nan
    logits[1] = -np.inf
    logits[2, 0] = np.inf
    logits[3, 1:] = -np.inf
    tokens, chosen = run(config, logits, seen=np.zeros((5, V), bool), logprobs=True)
    assert tokens.tolist()[:4] == [-1, -1, -1, 0]
    assert tokens[4] >= 0
    np.testing.assert_array_equal(np.isnan(chosen), [True, True, True, False, False])
    assert chosen[3] == 0.0


def test_a_penalty_that_overflows_gives_minus_one():
    logits, seen = np.float32([[1e10, 1], [2, 1]]), np.array([[True, False]] * 2)
    tokens, chosen = run(GenerationConfig(repetition_penalty=1e-30), logits, seen=seen, logprobs=True)
    assert tokens.tolist() == [-1, 0]
    np.testing.assert_array_equal(np.isnan(chosen), [True, False])


def test_other_values_compile_nothing_anew():
    traces = []

    @jax.jit
    def counted(*arguments):
        traces.append(arguments)
        return sample(*arguments)

    arguments = (some_logits(2), sequence_keys(0, 2), np.zeros(2, np.int32), some_seen(2))
    for temperature, top_p, min_p, penalty in [(0.5, 0.9, 0.1, 1.2), (2, 0.3, 0.2, 3), (1, 0.99, 1, 0.5)]:
        config = GenerationConfig(temperature, 3, top_p, min_p, penalty)
        counted(*arguments, config.sampler())
    assert len(traces) == 1
    wider = dataclasses.replace(config, top_k=4)
    counted(*arguments, wider.sampler())
    assert len(traces) == counted._cache_size() == 2


def test_what_is_off_is_not_compiled():
    def program(**settings):
        config = GenerationConfig(**settings)
        arguments = (some_logits(2), sequence_keys(0, 2), np.zeros(2, np.int32), some_seen(2))
        return str(jax.make_jaxpr(sample)(*arguments, config.sampler()))

    marks = ("random_bits", " sort", "top_k", "cumsum", "exp ", "div", "log ")

    def holds(**settings):
        return {mark.strip() for mark in marks if mark in program(**settings)}

    assert holds(top_k=3, top_p=0.9, min_p=0.1) == set()
    drawing = {"random_bits", "div", "log"}
    assert holds(temperature=1.0, top_p=1.0, min_p=0.0, repetition_penalty=1.0) == drawing
    assert holds(temperature=1.0, min_p=0.1) == drawing | {"exp"}
    assert holds(temperature=1.0, top_p=0.9) == drawing | {"sort", "cumsum", "exp"}
    assert holds(temperature=1.0, top_k=3) == drawing | {"top_k", "cumsum"}
    assert holds(temperature=1.0, top_k=3, top_p=0.9) == drawing | {"top_k", "cumsum", "exp"}


def test_what_would_change_nothing_is_off():
    assert GenerationConfig(0, 5, 0.5, 0.5).sampler() == Sampler()
    assert GenerationConfig(1.0, None, 1, 0.0, 1).sampler() == Sampler(jnp.float32(1.0))
    on = GenerationConfig(1.0, 5, 0.5, 0.5, 2.0, logprobs=True).sampler()
    assert (on.top_k, on.logprobs) == (5, True)
    assert [(leaf.dtype.name, leaf.item()) for leaf in jax.tree.leaves(on)] == [
        ("float32", value) for value in (1.0, 0.5, 0.5, 2.0)
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", value) for value in (-1, float("nan"), float("inf"), 1e-40, True, "1", None, 10**400)],
        *[("top_k", value) for value in (0, -1, 2.0, True, "3")],
        *[("top_p", value) for value in (0, -0.1, 1.01, float("nan"), True, "0.9")],
        *[("min_p", value) for value in (-0.1, 1.01, float("nan"), False, "0.1")],
        *[("repetition_penalty", value) for value in (0, -1, float("nan"), float("inf"), True, None)],
        *[("seed", value) for value in (-1, 2**32, 0.0, True, None)],
    ],
)
def test_values_that_are_not_allowed_are_named(field, value):
    with pytest.raises(ConfigError) as caught:
        GenerationConfig(**{field: value})
    assert str(caught.value).startswith(f"generation.{field} = {value!r}: must be ")
    assert "\n" not in str(caught.value)


def test_sequence_keys_are_of_one_seed_each():
    data = jax.random.key_data
    keys = sequence_keys(7, 3)
    assert (keys.shape, str(jax.random.key_impl(keys))) == ((3,), "threefry2x32")
    for i in range(3):
        np.testing.assert_array_equal(data(keys[i]), data(jax.random.key(7 + i, impl="threefry2x32")))
    np.testing.assert_array_equal(data(sequence_keys([9, 8, 7], 3))[::-1], data(keys))
    np.testing.assert_array_equal(data(sequence_keys(np.array([7, 8, 9]), 3)), data(keys))
    np.testing.assert_array_equal(data(sequence_keys(2**32 - 1, 2)), data(sequence_keys([2**32 - 1, 0], 2)))
    for bad in ([1, 2], [1, 2, -1], -1, 1.5, True, "12"):
        with pytest.raises(ConfigError, match=r"generation\.seed = "):
            sequence_keys(bad, 3)


def test_seen_tokens_of_prompts_and_of_chosen_tokens():
    seen = seen_tokens([[1, 1, 3], [], [0, 4], [2]], 5)
    want = np.array([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1], [0, 0, 1, 0, 0]], bool)
    np.testing.assert_array_equal(seen, want)
    got = jax.jit(mark_seen)(seen, np.int32([1, 2, 3, -1]), np.array([True, True, False, True]))
    want[1, 2] = True
    np.testing.assert_array_equal(got, want)
    assert got.dtype == np.bool_

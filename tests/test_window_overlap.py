"""`model.window_overlap` against the NumPy reference, on every path that runs a window."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.test_context import make_decoder as spread_decoder
from tests.decoding.test_context import small_caches
from tests.decoding.test_exactness import TOLERANCE, check_every_way, compared, largest_error, make_decoder, truth
from tests.parallel.test_batch_split import MESHES, TRAIN, gradient, gradient_error
from tests.parallel.test_batch_split import MODEL as TRAINED
from tests.support import golden, reference
from tests.support.models import SMALL
from tests.support.optional import need_modules
from tests.test_model import golden_scale
from tlinformer_jax import ModelConfig, build_model
from tlinformer_jax.analysis.flops import training_flops
from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.data.tasks import REGIONS, Samples, regions
from tlinformer_jax.decoding import Generator, cache_bytes, history, windowed
from tlinformer_jax.decoding import cache as cache_module
from tlinformer_jax.decoding import decoder as decoder_module
from tlinformer_jax.decoding.cache import WindowedCache
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.interop import params_from_reference, params_to_reference
from tlinformer_jax.interop.files import read_weights, write_safetensors
from tlinformer_jax.models import tlinformer, windows
from tlinformer_jax.parallel.sharding import SplitRows
from tlinformer_jax.training import window_loss as loss_module
from tlinformer_jax.training.loss import summed_loss

OVERLAPPING = dataclasses.replace(SMALL, hidden_depth=0, history_window=3, window_overlap=2)
FED = 27  # six windows of 4 tokens, and one of 3

slow = pytest.mark.slow


def overlapping(**changes) -> ModelConfig:
    return dataclasses.replace(OVERLAPPING, **changes)


# ---- The configuration


@pytest.mark.parametrize("value", [-1, 1.0, True, None, "2"])
def test_it_is_an_integer(value):
    with pytest.raises(ConfigError, match=r"model\.window_overlap = .*: must be an integer >= 0"):
        ModelConfig(window_overlap=value)


@pytest.mark.parametrize("value", [4, 9])
def test_it_is_less_than_the_window(value):
    with pytest.raises(ConfigError, match=rf"overlap = {value}: must be less than model\.generation_window = 4$"):
        overlapping(window_overlap=value)


@pytest.mark.parametrize("architecture", ["transformer", "sliding_window"])
def test_a_baseline_has_none(architecture):
    allowed = rf"model\.window_overlap = 2: must be 0 for model\.architecture = '{architecture}'$"
    with pytest.raises(ConfigError, match=allowed):
        overlapping(architecture=architecture)
    assert ModelConfig().window_overlap == 0


# ---- The forward pass

PLANS = {
    "one after the other": ExecutionPlan(segments=2),
    "together": ExecutionPlan(segments=2, together=3),
    "all together": ExecutionPlan(together=6, scan_layers=False),
    "checkpointing": ExecutionPlan(segments=3, together=2, checkpointing=True),
    "chunks": ExecutionPlan(chunk=2, checkpointing=True),
}
SHAPES = {
    "paper's block": {"hidden_depth": 2},
    "one": {"window_overlap": 1},
    "all but one": {"window_overlap": 3},
    "tconstformer": {"architecture": "tconstformer"},
    "auto": {"history_window": "auto", "generation_window": 6, "window_overlap": 5},
    "shift": {"token_shift": True, "num_blocks": 3},
}


@pytest.mark.parametrize(
    ("shape", "plan"),
    [("paper's block", "one after the other"), ("one", "together"), ("auto", "one after the other")]
    + [pytest.param(*case, marks=slow) for case in (("all but one", "together"), ("shift", "all together"))],
)
def test_logits_are_the_references(shape, plan):
    config = overlapping(**SHAPES[shape], memory=PLANS[plan])
    tokens, expected = truth(config, FED, 2)
    logits = jax.jit(build_model(config).apply)(golden_scale(config), tokens)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE)
    size = config.generation_window
    without = reference.logits(golden.random_weights(config), dataclasses.replace(config, window_overlap=0), tokens)
    np.testing.assert_array_equal(without[:, :size], expected[:, :size])
    assert np.abs(without - expected)[:, size:].max(-1).min() > 1e-3, "every later token is another"


def test_windows_from_a_position_on_are_those_of_the_whole():
    """As a task's evaluation runs them: the first that is wanted has its overlap, too."""
    config = OVERLAPPING
    tokens, expected = truth(config, FED, 2)
    model, variables = build_model(config), golden_scale(config)
    hidden = jax.jit(partial(model.apply, start=9, method=model.hidden_states))(variables, tokens)
    np.testing.assert_allclose(hidden @ variables["params"]["embedding"].T, expected[:, 9:], atol=TOLERANCE)


# ---- Generation


@slow
@pytest.mark.parametrize("shape", ["paper's block", "all but one", "auto"])
def test_prefill_step_and_slide_equal_the_reference(shape):
    """Prompts of unequal lengths in one batch, each continued across at least three slides."""
    config = overlapping(**SHAPES[shape])
    size = config.generation_window
    prompts = [max(size - 1, 1), size, size + 1, 1, 3 * size]
    check_every_way(config, prompts, 6 * size + 3, alone=(1, 2 * size))


@slow
def test_chunks_and_growing_caches_change_nothing(monkeypatch, own_traces):
    """Several chunks and rounds; block 0's rows are looked up by token."""
    monkeypatch.setattr(cache_module, "SMALLEST_CLASS", 16)
    monkeypatch.setattr(cache_module, "CHUNK_ROWS", 4)
    monkeypatch.setattr(cache_module, "ROUNDS", 2)
    monkeypatch.setattr(history, "ROWS_PER_TOKEN", 0)
    assert largest_error(make_decoder(OVERLAPPING), [21, 2], 46, room=21) < TOLERANCE


@slow
def test_a_first_slide_into_a_cache_of_fewer_rows_than_a_window(monkeypatch, own_traces):
    """It appends two rows of four, and there is room for no more."""
    monkeypatch.setattr(cache_module, "CLASS_STEPS", (2, 3))
    monkeypatch.setattr(cache_module, "SMALLEST_CLASS", 2)
    decoder = make_decoder(OVERLAPPING)
    assert decoder.init_cache(1, 5).capacity == 2
    assert largest_error(decoder, [2], 14, room=5) < TOLERANCE


@slow
def test_a_history_over_devices_equals_the_reference(monkeypatch, own_traces):
    """One that is read by ever longer windows; others: tests/test_options_together.py."""
    small_caches(monkeypatch, rows_per_token=0)
    config = overlapping(generation_window=5, history_window="auto", window_overlap=1)
    assert largest_error(spread_decoder(config, 2), [5, 16, 1], 33, room=16) < TOLERANCE


def test_the_generator_slides_when_windows_are_full():
    """Greedy tokens are those of the whole forward pass; a slide for each window that a sequence enters."""
    config = OVERLAPPING
    generator = Generator(build_model(config), golden_scale(config))
    prompts = [truth(config, FED, 3)[0][row, :length] for row, length in enumerate((3, 4, 9))]
    for prompt, generation in zip(prompts, generator.run(prompts, max_new_tokens=14)):
        whole = np.concatenate([prompt, generation.tokens])
        logits = reference.logits(golden.random_weights(config), config, whole[None])[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == generation.tokens
        windows = (len(whole) - 2) // 4 - (len(prompt) - 1) // 4
        assert generation.slides == windows


@pytest.mark.parametrize("architecture", ["tlinformer", "tconstformer"])
def test_cache_bytes_are_those_of_its_arrays_and_rows(architecture):
    """At 11 tokens the window began at 8: it has 3 rows and 2 before them; 6 are history."""
    config = overlapping(architecture=architecture)
    cache = make_decoder(config).init_cache(2, 20)
    sizes = cache_bytes(config, cache, [11, 4])
    assert sizes.allocated == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert cache.window.rows == 6
    row = 2 * config.d_model * 4
    assert sizes.parts["window"].used == (5 + 4) * config.num_layers * row
    assert sizes.parts["history"].used == (6 * config.num_blocks * row if architecture == "tlinformer" else 0)


def test_answers_in_the_overlap_are_the_windows_own():
    """The question at 9, in the window of 8 .. 11, has 6 and 7 as rows of its own; of 6 rows it observes 3."""
    sources = np.arange(9)
    samples = Samples.of(np.zeros((9, 13), int), np.full((9, 1), 9), sources[:, None])
    found = regions(samples, 4, OVERLAPPING.observed_rows, OVERLAPPING.window_overlap)[:, 9]
    assert [REGIONS[region] for region in found] == ["history"] * 3 + ["observed"] * 3 + ["own"] * 3


def slide_without_overlap(monkeypatch):
    """A slide does not run the rows that overlap: the window's cache still begins with the window before."""
    real = windowed._rebuild

    def mutated(params, config, cache, *rest):
        new, x = real(params, config, cache, *rest)
        in_slide = rest[-1].size == config.window_overlap
        return (dataclasses.replace(new, window=cache.window) if in_slide else new), x

    monkeypatch.setattr(windowed, "_rebuild", mutated)


def overlap_read_twice(monkeypatch):
    """A token reads the overlapping rows in its window, and as history too."""
    real = WindowedCache.read_by

    def mutated(cache, config, layer):
        window, context = real(cache, config, layer)
        if layer % config.layers_per_block == 0 and context is not None:
            longer = jnp.where(context.length > 0, context.length + config.window_overlap, 0)
            context = context.replace(length=longer)
        return window, context

    monkeypatch.setattr(WindowedCache, "read_by", mutated)


def overlap_misplaced(monkeypatch):
    """A slide rotates the overlapping rows as if each stood one further."""
    real = windowed.rope_table
    overlap = OVERLAPPING.window_overlap
    monkeypatch.setattr(windowed, "rope_table", lambda at, *rest: real(at + (at.shape == (overlap,)), *rest))


def history_of_the_published_model(monkeypatch):
    """How much a slide observes is counted as if no rows overlapped."""
    real = decoder_module.history_of
    without = dataclasses.replace(OVERLAPPING, window_overlap=0)
    monkeypatch.setattr(decoder_module, "history_of", lambda config, tokens: real(without, tokens))


MUTATIONS = (slide_without_overlap, overlap_read_twice, overlap_misplaced, history_of_the_published_model)


@slow
@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_mistakes_in_the_decoder_are_caught(mutate, monkeypatch, own_traces):
    mutate(monkeypatch)
    error, _ = compared(make_decoder(OVERLAPPING), [3, 9], 15)
    assert error > 100 * TOLERANCE


# ---- Training


def batch_of() -> dict[str, np.ndarray]:
    tokens, _ = truth(OVERLAPPING, FED + 1, 2)
    tokens = tokens.astype(np.int32)
    weights = np.random.default_rng(4).integers(0, 2, (2, FED)).astype(np.float32)
    return {"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "weights": weights}


def loss_and_gradient(config):
    """A jitted function of (params, windows or None), of the summed loss."""
    model = build_model(config)
    return jax.jit(
        jax.value_and_grad(
            lambda params, windows: summed_loss(params, batch_of(), jax.random.key(0), model=model, windows=windows)[0]
        )
    )


def reference_loss(weights, config) -> float:
    given = batch_of()
    logits = reference.logits(weights, config, given["inputs"])
    return float((reference.token_losses(logits, given["labels"]) * given["weights"]).sum())


@slow
@pytest.mark.parametrize(
    ("shape", "plan"),
    [
        *(("paper's block", plan) for plan in ("all together", "chunks")),
        *((shape, "checkpointing") for shape in ("all but one", "tconstformer", "auto", "shift")),
    ],
)
def test_loss_and_gradient_are_the_references(shape, plan):
    """Differentiated as a whole, or window by window; the gradient along the weights themselves."""
    config = overlapping(**SHAPES[shape], memory=PLANS[plan])
    weights = golden.random_weights(config)
    params = golden_scale(config)["params"]
    value, gradients = loss_and_gradient(config)(params, None)
    assert float(value) == pytest.approx(reference_loss(weights, config), rel=1e-5)

    def scaled(factor: float) -> float:
        return reference_loss({name: np.asarray(w, np.float64) * factor for name, w in weights.items()}, config)

    slope = (scaled(1 + 1e-6) - scaled(1 - 1e-6)) / 2e-6
    assert abs(slope) > 1
    along = sum(np.vdot(g, p) for g, p in zip(jax.tree.leaves(gradients), jax.tree.leaves(params), strict=True))
    assert along == pytest.approx(slope, rel=1e-3)


@slow
def test_gradients_window_by_window_are_those_of_the_whole():
    one, *others = (
        loss_and_gradient(overlapping(memory=plan))(golden_scale(OVERLAPPING)["params"], None)
        for plan in (PLANS["together"], dataclasses.replace(PLANS["together"], checkpointing=True), PLANS["chunks"])
    )
    for other in others:
        assert float(one[0]) == pytest.approx(float(other[0]), rel=1e-6)
        for value, expected in zip(jax.tree.leaves(other[1]), jax.tree.leaves(one[1]), strict=True):
            np.testing.assert_allclose(value, expected, atol=1e-5 * np.abs(expected).max())


def overlap_read_out(monkeypatch):
    """A window's loss is that of its first rows, not of its last."""
    real = loss_module.window_states

    def mutated(blocks, config, C, x, *rest):
        states = real(blocks, config, C, x, *rest)
        return jnp.roll(states, states.shape[1] - config.generation_window, axis=1)

    monkeypatch.setattr(loss_module, "window_states", mutated)


def overlap_is_history_too(monkeypatch):
    """The history of a window does not end before the rows that overlap."""
    real = loss_module.place_in_segment

    def mutated(config, run, *rest):
        C, *others = real(config, run, *rest)
        return dataclasses.replace(C, length=C.length + run.overlap(config)), *others

    monkeypatch.setattr(loss_module, "place_in_segment", mutated)


def window_misplaced(monkeypatch):
    """All but the first layer rotate a window's rows as if each stood one before."""
    real = tlinformer.place_window

    def mutated(frame, rope, rows):
        placed = real(frame, rope, rows)
        x_rope = rope.rows(frame.history_length - 1, rows)
        return dataclasses.replace(placed, x_rope=x_rope) if frame.observed_width else placed

    monkeypatch.setattr(tlinformer, "place_window", mutated)


def overlap_of_another_window(monkeypatch):
    """The rows before a window are those before the window before it."""
    real = windows.window_rows

    def mutated(config, array, first, count, together=1, overlap=0):
        wrong, rows = (real(config, array, begin, count, together, overlap) for begin in (max(first - 1, 0), first))
        return jnp.concatenate([wrong[:, :, :overlap], rows[:, :, overlap:]], axis=2)

    monkeypatch.setattr(windows, "window_rows", mutated)


TRAINING_MUTATIONS = (overlap_read_out, overlap_is_history_too, window_misplaced, overlap_of_another_window)


@slow
@pytest.mark.parametrize("mutate", TRAINING_MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_mistakes_in_training_are_caught(mutate, monkeypatch, own_traces):
    mutate(monkeypatch)
    config = overlapping(memory=PLANS["chunks"])
    value, _ = loss_and_gradient(config)(golden_scale(config)["params"], None)
    assert float(value) != pytest.approx(reference_loss(golden.random_weights(config), config), rel=1e-3)


@slow
def test_devices_that_look_up_other_rows_are_noticed(monkeypatch, own_traces):
    """Rows split over devices: a window's are gathered from where they lie."""
    model = dataclasses.replace(TRAINED, num_blocks=1, window_overlap=3)
    one = gradient(model, TRAIN)
    real = SplitRows.gather
    monkeypatch.setattr(
        SplitRows, "gather", lambda split, rows, start, length: real(split, rows, start - (length == 7), length)
    )
    assert gradient_error(one, gradient(model, TRAIN, MESHES["data, window, context"])) > 0.01


@pytest.mark.parametrize("architecture", ["tlinformer", "tconstformer"])
def test_it_costs_the_longer_windows(architecture):
    """Twice the rows in each later window, but for a shorter history: between once and twice the work."""
    plain = overlapping(architecture=architecture, generation_window=16, window_overlap=0)
    costs = [
        training_flops(dataclasses.replace(plain, window_overlap=overlap), 16 * 9, first=16 * 8, read=16)
        for overlap in (0, 8, 15)
    ]
    assert costs[0] < costs[1] < costs[2] < 2 * costs[0]
    assert training_flops(plain, 16) == training_flops(dataclasses.replace(plain, window_overlap=8), 16)


# ---- Files


def test_safetensors_say_it_only_where_there_is_some(tmp_path):
    need_modules("safetensors", extra="convert")
    import safetensors

    for overlap in (0, 3):
        config = overlapping(window_overlap=overlap)
        variables, path = golden_scale(config), tmp_path / f"{overlap}.safetensors"
        write_safetensors(path, params_to_reference(variables, config), config)
        jax.tree.map(np.testing.assert_array_equal, params_from_reference(read_weights(path), config), variables)
        with safetensors.safe_open(path, "numpy") as file:
            shape = json.loads(file.metadata()["tlinformer"])
        assert shape.get("window_overlap", 0) == overlap
        assert ("window_overlap" in shape) == bool(overlap)

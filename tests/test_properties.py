"""Random configurations: valid ones train a finite step and decode as the forward pass, invalid ones are named."""

import dataclasses
import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from tests.support import golden, reference
from tlinformer_jax import ModelConfig, build_model
from tlinformer_jax.config import data as data_config
from tlinformer_jax.config import model as model_config
from tlinformer_jax.config import train as train_module
from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.config.model import MEMORY
from tlinformer_jax.config.run import SECTIONS, RunConfig, run_config
from tlinformer_jax.decoding.cache import history_of
from tlinformer_jax.decoding.decoder import Decoder
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.interop import params_from_reference
from tlinformer_jax.training.optimizer import Horizon
from tlinformer_jax.training.step import init_state, train_step

TOLERANCE = 2e-5  # as in tests/decoding/test_exactness.py
VOCABULARY = 29
FRACTIONS = (0.25, 0.382, 0.5, 0.618, 0.75)


def settings(examples: int, seconds_each: bool = False) -> hypothesis.settings:
    """The same examples at every run; a failing one that takes seconds is not made smaller."""
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    return hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
        phases=phases if seconds_each else [*phases, hypothesis.Phase.shrink],
    )


@st.composite
def windows(draw, architecture: str) -> dict:
    """Both windows: sizes, a fraction of their sum, or a compressed context that grows."""
    how = draw(st.sampled_from(["sizes", "fraction", *(["auto"] if architecture != "sliding_window" else [])]))
    if how == "fraction":
        total = draw(st.integers(4, 12))
        history = max(1, round(draw(st.sampled_from(FRACTIONS)) * total))
        return {"history_window": history, "generation_window": total - history}
    history = "auto" if how == "auto" else draw(st.integers(1, 7))
    return {"history_window": history, "generation_window": draw(st.integers(1, 7))}


@st.composite
def valid_configs(draw, architecture: str | None = None, blocks: int = 1, windows_of: int = 0) -> RunConfig:
    """A small model and a step of training over it.

    Args:
      draw: of Hypothesis.
      architecture: of the model; None for any.
      blocks: the fewest that it has.
      windows_of: generation windows that a sequence has at least; 0 for any length.
    """
    architecture = architecture or draw(st.sampled_from(model_config.ARCHITECTURES))
    heads, width = draw(st.sampled_from([(1, 16), (2, 8), (4, 4), (3, 4)]))
    rotates = architecture != "gated_deltanet"
    model = {
        "memory": ExecutionPlan(
            segments=draw(st.integers(1, 3)),
            together=draw(st.integers(1, 2)),
            chunk=draw(st.sampled_from([0, 3])),
            scan_layers=draw(st.booleans()),
            checkpointing=draw(st.booleans()),
        ),
        "architecture": architecture,
        "vocab_size": VOCABULARY,
        "d_model": heads * width,
        "num_heads": heads,
        "num_blocks": draw(st.integers(blocks, 2)),
        "hidden_depth": draw(st.integers(0, 2)),
        "d_ff": draw(st.sampled_from([16, 24] if architecture in model_config.RECURRENT else [8, 12])),
        "dropout": draw(st.sampled_from([0.0, 0.3])),
        "num_experts": draw(st.sampled_from([0, 0, 3])),
        "dtype": "float32",
        "attention": "xla",
        "longest_wavelength": draw(st.sampled_from([0, 20])) * rotates,
        **draw(windows(architecture)),
    }
    if architecture in model_config.WINDOWED:
        model["window_overlap"] = draw(st.integers(0, model["generation_window"] - 1))
        if architecture == "tlinformer" and not model["window_overlap"]:
            model["causal_history"] = draw(st.booleans())
        model["key_taps"] = draw(st.integers(0, model_config.MOST_TAPS)) * (model["num_blocks"] > 1)
    least = (windows_of - 1) * model["generation_window"] + 1 if windows_of else 1
    length = draw(st.integers(least, max(24, least + 2)))
    number = -(-length // model["generation_window"])
    sampled = draw(st.integers(0, min(number, 2))) if architecture in model_config.WINDOWED else 0
    train = {
        "batch_size": 4,
        "accumulation": draw(st.sampled_from([1, 2])),
        "sampled_windows": sampled,
        "warmup_steps": 0,
        "z_loss": draw(st.sampled_from([0.0, 1e-4])),
        "ema": draw(st.sampled_from([0.0, 0.9])),
        "steps": "1epoch",
        "optimizer": draw(st.sampled_from(train_module.OPTIMIZERS)),
        "schedule": draw(st.sampled_from([*train_module.SCHEDULES, "wsd:0.2"])),
    }
    return run_config({"model": model, "train": train, "data": {"sequence_length": length}})


def check_step(config: RunConfig) -> None:
    """One update: finite, and (where windows are not sampled) of a loss near a guess's; the parameters have moved."""
    model, length = build_model(config.model), config.data.sequence_length
    state = jax.jit(lambda key: init_state(key, model, config.train, Horizon(10, 10)))(jax.random.key(0))
    tokens = np.random.default_rng(length).integers(0, VOCABULARY, (4, length + 1)).astype(np.int32)
    batch = {"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "weights": np.ones((4, length), np.float32)}
    step = functools.partial(train_step, model=model, config=config.train, horizon=Horizon(10, 10))
    after, metrics = jax.jit(step)(state, batch)
    assert (int(after.step), int(after.skips.total)) == (1, 0)
    assert 0 < float(metrics["loss"]) < math.inf
    assert config.train.sampled_windows or abs(float(metrics["loss"]) - math.log(VOCABULARY)) < 1
    assert 0 < float(metrics["grad_norm"]) < math.inf
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.params))
    assert not np.array_equal(after.params["embedding"], state.params["embedding"])


def check_decoding(config: ModelConfig, length: int, prompt: int) -> None:
    """Prefill and steps give the logits of the forward pass, and both those of the NumPy reference."""
    weights = golden.random_weights(config)
    variables = params_from_reference(weights, config)
    model = build_model(config)
    tokens = np.random.default_rng(length).integers(0, VOCABULARY, (1, length)).astype(np.int32)
    forward = np.asarray(jax.jit(model.apply)(variables, tokens))[0]
    np.testing.assert_allclose(forward, reference.logits(weights, config, tokens)[0], atol=TOLERANCE, rtol=0)
    decoder = Decoder(model, variables)
    cache = decoder.init_cache(1, length)
    cache, logits = decoder.prefill(cache, 0, tokens[0, :prompt])
    np.testing.assert_allclose(logits, forward[prompt - 1], atol=TOLERANCE, rtol=0)
    for position in range(prompt, length):
        cache = decoder.grow(cache, position + 1)
        if config.windowed and history_of(config, position + 1) > history_of(config, position):
            cache = decoder.slide(cache, 0, position)
        cache, logits = decoder.step(cache, tokens[:, position], np.ones(1, bool))
        np.testing.assert_allclose(logits[0], forward[position], atol=TOLERANCE, rtol=0, err_msg=f"at {position}")


def check_valid(config: RunConfig, prompt: int) -> None:
    check_step(config)
    length = config.data.sequence_length
    check_decoding(config.model, length, min(prompt, length))


# Of two blocks and four windows, the last of them short; and a prompt. The slow test draws the other architectures.
STRATUM = {"vocab_size": VOCABULARY, "d_model": 8, "num_heads": 2, "num_blocks": 2, "hidden_depth": 0, "d_ff": 8}
STRATUM |= {"dtype": "float32", "attention": "xla", "generation_window": 3}
STRATA = {
    "tlinformer": (
        {"memory": ExecutionPlan(checkpointing=True), "history_window": 4},
        4,
    ),
    "transformer": ({"memory": ExecutionPlan(scan_layers=True), "dropout": 0.1}, 2),
    "gated_deltanet": ({"memory": ExecutionPlan(scan_layers=True), "dropout": 0.1, "d_ff": 16}, 5),
}
# The hybrid has the layers of both.
SUBSETS = ("transformer", "gated_deltanet")


@pytest.mark.parametrize(
    "architecture", ["tlinformer", "transformer", pytest.param("gated_deltanet", marks=pytest.mark.slow)]
)
def test_valid_configs_train_and_decode(architecture):
    changes, prompt = STRATA[architecture]
    model, train = STRATUM | {"architecture": architecture} | changes, {"batch_size": 4, "warmup_steps": 0}
    check_valid(run_config({"model": model, "train": train, "data": {"sequence_length": 10}}), prompt)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [name for name in model_config.ARCHITECTURES if name not in SUBSETS])
def test_many_valid_configs_train_and_decode(architecture):
    """Of at least two blocks and three windows, with prompts of one window or two, so that decoding crosses edges."""

    @settings(2, seconds_each=True)
    @hypothesis.given(valid_configs(architecture, blocks=2, windows_of=3), st.data())
    def check(config, data):
        assert config.data.sequence_length > 2 * config.model.generation_window
        check_valid(config, data.draw(st.integers(1, 2 * config.model.generation_window)))

    check()


# Values that a field never takes, whatever it is.
NEVER = [None, (), {}, [1], b"x", 1 + 2j]
LEAST = {
    "model": {"hidden_depth": 0, "d_ff": 1, "history_window": 1, "window_overlap": 0, "longest_wavelength": 0}
    | {"num_experts": 0, "experts_per_token": 1, "key_taps": 0}
    | dict.fromkeys(("vocab_size", "d_model", "num_heads", "num_blocks", "generation_window"), 1),
    "train": dict.fromkeys(("steps", "batch_size", "accumulation", "log_every"), 1)
    | dict.fromkeys(("sampled_windows", "seed", "warmup_steps", "eval_every"), 0)
    | dict.fromkeys(("checkpoint_every", "max_skipped_updates"), 0),
    "data": dict.fromkeys(("sequence_length", "examples", "num_items"), 1) | {"shingle": 0},
}
CHOICES = {
    "model": {
        "memory": MEMORY,
        "architecture": model_config.ARCHITECTURES,
        "dtype": model_config.COMPUTE_DTYPES,
        "attention": model_config.ATTENTION_BACKENDS,
        "history_window": ("auto",),
    },
    "train": {
        "optimizer": train_module.OPTIMIZERS,
        "schedule": (*train_module.SCHEDULES, "wsd:0.2"),
        "eval_every": ("epoch",),
        "checkpoint_every": ("30s", "10min", "1.5h"),
    },
    "data": {"dataset": data_config.DATASETS},
}
SWITCHES = {"model": ("causal_history", "token_shift"), "train": ("deterministic",), "data": ("document_masking",)}
RATES = {
    "model": {"dropout": 1.0},
    "train": {"ema": 1.0} | dict.fromkeys(("learning_rate", "weight_decay", "z_loss", "clip_norm"), math.inf),
}
TEXTS = {"data": ("tokenizer", "train_files", "text_field", "curriculum")}


def invalid_values() -> dict[str, st.SearchStrategy]:
    """Field -> values that it must refuse."""
    never, found = st.sampled_from(NEVER), {}
    fractions = st.floats(allow_nan=True, allow_infinity=True)
    for section in SECTIONS:
        for name, least in LEAST.get(section, {}).items():
            wrong = st.integers(max_value=least - 1) | fractions | st.booleans() | never
            found[f"{section}.{name}"] = wrong if name in ("d_ff", "max_skipped_updates") else wrong | st.just("3")
        for name, choices in CHOICES.get(section, {}).items():
            words = st.text(st.characters(codec="utf-8"), min_size=1).filter(
                lambda word, choices=choices: not set(map(str.strip, word.split(","))) <= {"", *choices}
            )
            more = st.nothing() if name in found else st.integers() | st.booleans()
            found[f"{section}.{name}"] = found.get(f"{section}.{name}", more | never) | words
        for name in SWITCHES.get(section, ()):
            found[f"{section}.{name}"] = st.integers() | st.text() | never
        for name, above in RATES.get(section, {}).items():
            wrong = st.floats(max_value=-1e-9) | st.floats(min_value=above) | st.just(math.nan)
            found[f"{section}.{name}"] = wrong | st.booleans() | st.text() | never
        for name in TEXTS.get(section, ()):
            found[f"{section}.{name}"] = st.integers() | st.booleans() | never
    found["train.keep_checkpoints"] = st.integers(max_value=0) | fractions | st.booleans() | never
    wrong_meshes = ["fsdp=0", "fsdp", "data=2", "fsdp=2,", "fsdp=2;tensor=2", "tensor=2,fsdp=1,tensor=2", "window=2.0"]
    found["train.mesh"] = st.sampled_from(wrong_meshes) | st.integers() | st.booleans() | never
    return found


INVALID = invalid_values()


@st.composite
def invalid_configs(draw) -> tuple[str, dict]:
    """A configuration with one field that is wrong, and the field's name."""
    field = draw(st.sampled_from(sorted(INVALID)))
    section, _, name = field.partition(".")
    value = draw(INVALID[field])
    hypothesis.assume(not (field == "model.d_ff" and value is None))
    values = values_of(draw(valid_configs()))
    values[section][name] = value
    return field, values


def values_of(config: RunConfig) -> dict:
    """As a file has them, where no plan is spelt out."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, memory="auto")).to_dict()


def check_refused(values: dict, fields: set[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        run_config(values)
    error, message = caught.value, str(caught.value)
    assert error.field in fields
    assert message.startswith(f"{error.field} = {error.value!r}: ")
    assert len(message.splitlines()) == 1


@settings(150)
@hypothesis.given(invalid_configs())
def test_a_field_that_is_wrong_is_named_in_one_line(case):
    field, values = case
    check_refused(values, {field})


@pytest.mark.slow
@settings(1500)
@hypothesis.given(invalid_configs())
def test_a_field_that_is_wrong_is_named_in_one_line_many_times(case):
    field, values = case
    check_refused(values, {field})


# Values that are allowed alone and not together; any of the fields may be the one that is named.
PLAIN = {"model.longest_wavelength": 0, "model.window_overlap": 0, "model.key_taps": 0, "model.causal_history": False}
TOGETHER = [
    {"model.num_heads": 3, "model.d_model": 8},
    {"model.num_heads": 2, "model.d_model": 6},
    {"model.num_experts": 2, "model.experts_per_token": 3},
    {"train.accumulation": 3, "train.batch_size": 4},
    {"train.schedule": "paper", "train.steps": 7},
    {"train.steps": "7@0.5", "data.dataset": "pydoc", "data.curriculum": ""},
    {"model.attention": "cudnn", "model.dropout": 0.1},
    PLAIN | {"model.architecture": "sliding_window", "model.history_window": "auto", "train.sampled_windows": 0},
    PLAIN | {"model.architecture": "transformer", "train.sampled_windows": 1},
    {"model.architecture": "gated_deltanet", "model.longest_wavelength": 20, "train.sampled_windows": 0}
    | {"model.window_overlap": 0, "model.key_taps": 0, "model.causal_history": False},
    {"model.causal_history": True, "model.window_overlap": 1, "model.generation_window": 4, "train.sampled_windows": 0},
    {"train.sampled_windows": 9, "model.generation_window": 4, "data.sequence_length": 24},
]


@settings(50)
@hypothesis.given(valid_configs(), st.sampled_from(TOGETHER))
def test_fields_that_do_not_go_together_are_named(config, changes):
    values = values_of(config)
    for field, value in changes.items():
        section, _, name = field.partition(".")
        values[section][name] = value
    check_refused(values, set(changes))


@settings(30)
@hypothesis.given(valid_configs(), st.sampled_from(sorted(SECTIONS)), st.text(min_size=1), st.integers())
def test_unknown_names_are_named(config, section, name, value):
    values = values_of(config)
    hypothesis.assume(name not in values[section] and name.isprintable())
    hypothesis.assume(name not in values)
    check_refused(values | {section: values[section] | {name: value}}, {f"{section}.{name}"})


def test_every_field_is_tried():
    """But those that take any text, or any path."""
    fields = {f"{section}.{field.name}" for section, kind in SECTIONS.items() for field in dataclasses.fields(kind)}
    assert fields - set(INVALID) == {"data.validation_files", "data.test_files"}

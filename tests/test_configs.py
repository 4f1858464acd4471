"""The config files: every variant loads, is what its name says, and is refused under another name."""

import dataclasses
import functools
import importlib.util
import math
import pathlib

import jax
import pytest
from absl import flags

from tests.support.commands import check_refusal, in_fork
from tlinformer_jax.commands import cli
from tlinformer_jax.config import recipes
from tlinformer_jax.config.run import RunConfig, run_config
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.experiments.recipes import MODELS
from tlinformer_jax.models import ModelConfig, build_model
from tlinformer_jax.training.optimizer import Horizon
from tlinformer_jax.training.step import init_state

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def module_of(path: pathlib.Path):
    """A config file as a module."""
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECALL, COPY = (module_of(CONFIGS / "recall.py").RECALL, module_of(CONFIGS / "copy.py").COPY)
TASKS = {
    "recall": module_of(CONFIGS / "recall.py").VARIANTS,
    "copy": COPY,
    "passkey": module_of(CONFIGS / "passkey.py").PASSKEY,
    "niah": module_of(CONFIGS / "niah.py").VARIANTS,
    "state": module_of(CONFIGS / "state.py").STATE,
}

# Table 1's rows: architecture, N, (W_oh, W_og), the paper's micro-batch and dropout.
ROWS = {
    "base-512": ("transformer", 512, None, 32, 0.2),
    "512-512-0.382": ("tlinformer", 512, (196, 316), 32, 0.2),
    "512-512-0.5": ("tlinformer", 512, (256, 256), 32, 0.1),
    "512-512-0.618": ("tlinformer", 512, (316, 196), 32, 0.2),
    "base-1k": ("transformer", 1024, None, 16, 0.2),
    "1k-512-0.5": ("tlinformer", 1024, (256, 256), 16, 0.2),
    "1k-1k-0.5": ("tlinformer", 1024, (512, 512), 16, 0.2),
    "base-2k": ("transformer", 2048, None, 8, 0.2),
    "2k-512-0.5": ("tlinformer", 2048, (256, 256), 8, 0.2),
    "2k-2k-0.5": ("tlinformer", 2048, (1024, 1024), 8, 0.2),
}
BOOKS = ("base-512", "base-16k", "512-512-0.5", "1k-512-0.618", "8192-1k-0.25")
VARIANTS = [
    ("tiny", None),
    *(("wt103", variant) for row in ROWS for variant in (row, f"paper-{row}")),
    *(("books", variant) for variant in BOOKS),
    *(("long", variant) for variant in ("64k", "1m")),
    *(("large", variant) for variant in ("125m", "350m", "1b3")),
    *((name, variant) for name, variants in TASKS.items() for variant in variants),
    *((name, None) for name in ("images", "genome", "proteins", "audio")),
]
OF_41M = ("wt103", "books", "long")


def get_config(name: str | pathlib.Path, *variant: str | None):
    """Calls `get_config` of configs/NAME.py, or of the file that a path names."""
    path = name if isinstance(name, pathlib.Path) else CONFIGS / f"{name}.py"
    return module_of(path).get_config(*(text for text in variant if text is not None))


def load(name: str, *variant: str | None) -> RunConfig:
    return run_config(get_config(name, *variant))


def from_flags(name: str | pathlib.Path, *arguments: str) -> RunConfig:
    """The configuration that a command line makes."""
    values = flags.FlagValues()
    argv = ["main", f"--config={CONFIGS / name}", *(f"--config.{argument}" for argument in arguments)]
    cli.define_config_flag(flag_values=values, sys_argv=argv)
    values(argv)
    return run_config(values.config)


def expected_parameters(config: ModelConfig) -> int:
    """Tied embedding, final LayerNorm; a layer's projections with biases, feed-forward and two LayerNorms."""
    width, hidden = config.d_model, 256 * math.ceil((8 * config.d_model // 3) / 256)
    layer = 4 * width * (width + 1) + 3 * width * hidden + 4 * width
    options = width * (config.token_shift + config.key_taps * (config.num_blocks - 1))
    return config.vocab_size * width + 2 * width + options + config.num_layers * layer


def test_every_config_file_is_tested():
    """Sweep files are loaded by tests/experiments/test_shipped_sweeps.py."""
    sweeps = {
        f"sweep_{name}"
        for name in (
            *("windows", "architectures", "options", "comparators", "recall"),
            *("copy", "passkey", "capacity", "niah", "state", "evidence"),
        )
    }
    assert {path.stem for path in CONFIGS.glob("*.py")} == {name for name, _ in VARIANTS} | sweeps


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_model_and_optimiser_are_built_and_have_the_right_size(name, variant):
    config = load(name, variant)
    init = functools.partial(
        init_state, model=build_model(config.model), config=config.train, horizon=Horizon(steps=10, decay_end=10)
    )
    state = jax.eval_shape(init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert count == (40_982_544 if name in OF_41M else expected_parameters(config.model))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.size > 1)
    assert moments == 2 * count


@pytest.mark.parametrize("prefix", ["", "paper-"])
@pytest.mark.parametrize("row", ROWS)
def test_rows_are_those_of_table_1(row, prefix):
    config = load("wt103", prefix + row)
    architecture, length, windows, micro_batch, dropout = ROWS[row]
    assert (config.model.architecture, config.data.sequence_length) == (architecture, length)
    if windows:
        assert (config.model.history_window, config.model.generation_window) == windows
    assert (config.data.dataset, config.data.tokenizer) == ("wikitext103", "gpt2")
    shape = config.model
    assert (shape.vocab_size, shape.d_model, shape.num_heads) == (50257, 432, 12)
    assert (shape.num_layers, shape.num_blocks, shape.hidden_depth) == (8, 2, 2)
    train = config.train
    assert (train.learning_rate, train.weight_decay) == (3e-4, 0.06)
    assert (train.clip_norm, train.warmup_steps) == (1.0, 2000)
    if prefix:
        assert (train.batch_size, train.micro_batch_size, config.model.dropout) == (256, micro_batch, dropout)
        assert (train.updates, train.epochs, train.equal_updates) == (0, 10, False)
        assert (train.schedule, train.eval_every) == ("paper", "epoch")
    else:
        assert (train.batch_size * length, train.steps, train.equal_updates) == (131_072, 9_080, True)
        assert config.model.dropout == 0.1
        assert train.schedule == "cosine"


def test_table_1_is_covered_and_defaults_are_our_recipe():
    assert set(recipes.TABLE_1) == set(ROWS)
    for name in ("wt103", "books"):
        assert get_config(name) == get_config(name, "512-512-0.5")


@pytest.mark.parametrize("variant", [f"{name}.py:{part}" for name, variants in TASKS.items() for part in variants])
def test_no_sample_of_a_task_is_seen_twice(variant):
    config = from_flags(variant)
    last = (config.data.sequence_length, config.train.updates - sum(stage.updates for stage in config.data.stages))
    taken = [
        count * config.train.batch_size * config.data.sequence_length // length
        for length, count, *_ in (*config.data.stages, last)
    ]
    assert all(count > 0 for count in taken)
    assert sum(taken) <= config.data.examples


def test_retrieval_settings_bind_where_they_say_so():
    for name, setting in RECALL.items():
        config = load("recall", name)
        windows = (config.model.history_window, config.model.generation_window)
        assert name.startswith(f"{config.data.sequence_length}-{config.data.num_items}")
        assert config.train.updates * config.train.batch_size * config.data.sequence_length <= 200_000_000
        assert 2 * setting.pairs % setting.generation_window == 0  # no answer stands in its question's window
        binds = setting.pairs >= 4 * windows[0] and setting.length >= 32 * windows[0]
        assert binds == name.endswith("tight")
        assert 3 * sum(windows) >= 0.75 * setting.length  # what README says of a sliding window's reach
    for name in COPY:
        config = load("copy", name)
        reach = int(config.model.history_window) + config.model.generation_window
        assert (config.data.sequence_length // 2 > reach) == name.endswith("tight")
    depths = {name: blocks * (hidden + 2) for name, (_, blocks, hidden) in MODELS.items()}
    assert all(name.endswith(f"-{depth}") for name, depth in depths.items())


def test_needles_and_states_are_what_their_names_say():
    for kind, dataset, needles in (("s1", "niah-1", 1), ("s2", "niah-2", 1), ("s3", "niah-3", 1), ("mk", "niah-2", 4)):
        for name, length in (("1k", 1024), ("4k", 4096), ("16k", 16384)):
            data = load("niah", f"{kind}-{name}").data
            assert (data.dataset, data.num_items) == (dataset, needles)
            assert (data.sequence_length, data.tokenizer) == (length, "gpt2")
            assert data.train_files == load("books").data.train_files
    for name in ("parity-64", "parity-256", "s5-64", "s5-256"):
        data = load("state", name).data
        assert f"{data.dataset}-{data.sequence_length}" == name
    for name in ("niah", "state"):
        with pytest.raises(ConfigError, match=r"variant = 'nonsense': must be one of "):
            get_config(name, "nonsense")


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("base-16k", ("transformer", 16384, 8, 256, 256)),
        ("1k-512-0.618", ("tlinformer", 1024, 128, 316, 196)),
        ("8192-1k-0.25", ("tlinformer", 8192, 16, 256, 768)),
    ],
)
def test_books_take_any_lengths_and_shares(variant, expected):
    config = load("books", variant)
    model, length = config.model, config.data.sequence_length
    windows = (model.history_window, model.generation_window)
    assert (model.architecture, length, config.train.batch_size, *windows) == expected
    assert (config.train, model.dropout) == (dataclasses.replace(load("wt103").train, batch_size=expected[2]), 0.1)
    assert (config.data.dataset, config.data.tokenizer) == ("text", "gpt2")


@pytest.mark.parametrize(
    ("name", "variant"), [("books", "1k-512-0.5"), ("books", "base-1k"), ("recall", "256-32-tight"), ("recall", "64-4")]
)
def test_plus_turns_on_what_pays(name, variant):
    plain, plus = load(name, variant), load(name, f"{variant}-plus")
    assert (plain.model.token_shift, plus.data.curriculum) == (False, "")
    model = dataclasses.replace(plain.model, token_shift=True)
    assert dataclasses.replace(plus, data=plain.data) == dataclasses.replace(plain, model=model)


@pytest.mark.parametrize(
    ("setting", "own", "stages"),
    [
        ("128-8", "128-8-grown", "64:2000"),
        ("256-16", "256-16-grown", "64:1500,128:1500"),
        ("512-64", "512-64", "64:1500"),
        ("256-32-tight", "256-32-tight", "64:800,128:800"),
        ("512-64-tight", "512-64-tight", "64:600,128:600,256:800"),
        ("1024-128-tight", "1024-128-tight", "512:2500"),
    ],
)
def test_recall_on_shorter_samples_first_differs_in_the_shift_and_the_stages(setting, own, stages):
    plain, grown = load("recall", own), load("recall", f"{setting}-grown-plus")
    assert (grown.model.token_shift, grown.data.curriculum) == (True, stages)
    model = dataclasses.replace(grown.model, token_shift=False)
    assert dataclasses.replace(grown, model=model, data=plain.data) == plain
    assert dataclasses.replace(grown.data, curriculum=plain.data.curriculum, examples=plain.data.examples) == plain.data


@pytest.mark.parametrize(("variant", "length", "sampled"), [("64k", 65_536, 0), ("1m", 1_048_576, 16)])
def test_long_sequences(variant, length, sampled):
    config = load("long", variant)
    assert (config.data.sequence_length, config.train.sampled_windows) == (length, sampled)
    assert (config.model.history_window, config.model.generation_window) == (1024, 1024)
    assert (config.train.micro_batch_size, config.model.dropout) == (1, 0.0)
    assert config.model.plan(length // 1024).checkpointing
    assert get_config("long") == get_config("long", "64k")


@pytest.mark.parametrize(
    ("variant", "millions", "devices", "tokens"),
    [
        ("125m", 123.6, 8, 524_288),
        ("125m", 123.6, 1, 524_288),
        ("350m", 360.0, 16, 524_288),
        ("1b3", 1336.5, 256, 2_097_152),
    ],
)
def test_large_models_fit_their_accelerators_mesh(variant, millions, devices, tokens):
    config = load("large", variant)
    model, train = config.model, config.train
    assert expected_parameters(model) / 1e6 == pytest.approx(millions, abs=0.1)
    assert (model.head_dim % 64, model.vocab_size % 128, model.vocab_size) == (0, 0, 50304)
    assert train.batch_size * config.data.sequence_length == tokens
    assert 18 < train.steps * tokens / expected_parameters(model) < 22
    assert set(train.axes) <= {"fsdp"}
    fsdp = train.axes.get("fsdp", 1)
    assert (devices % fsdp, train.micro_batch_size % devices, model.d_model % fsdp) == (0, 0, 0)
    assert get_config("large") == get_config("large", "125m")


@pytest.mark.parametrize(
    ("name", "variant", "message"),
    [
        ("wt103", "nonsense", r"variant = 'nonsense': must be one of base-512, .*, paper-2k-2k-0\.5"),
        ("wt103", "paper-4k-512-0.5", r"variant = 'paper-4k-512-0\.5': must be one of"),
        ("large", "7b", r"variant = '7b': must be one of 125m, 350m, 1b3"),
        ("long", "2m", r"variant = '2m': must be one of 64k, 1m"),
        ("books", "nonsense", r"variant = 'nonsense': must be base-N or N-T-r"),
        ("books", "paper-512-512-0.5", "must be base-N or N-T-r"),
        ("books", "512-512-0.0", "must be base-N or N-T-r"),
        ("books", "512-512-0.9999", "must be base-N or N-T-r"),
        ("books", "0k-512-0.5", "must be base-N or N-T-r"),
        ("books", "512-0-0.5", "must be base-N or N-T-r"),
        ("books", "nonsense-plus", "must be base-N or N-T-r"),
        ("recall", "256-plus", r"variant = '256-plus': must be one of 64-4, "),
        ("books", "768-512-0.5", "must have an N that divides the 131,072 tokens of an update"),
    ],
)
def test_unknown_variants_are_refused_in_one_line(name, variant, message):
    with pytest.raises(ConfigError, match=message) as caught:
        get_config(name, variant)
    assert "\n" not in str(caught.value)


def test_an_unknown_variant_on_the_command_line(tmp_path):
    refused = in_fork("tlinformer_jax.main", "--config=configs/wt103.py:nonsense", f"--workdir={tmp_path}/run")
    check_refusal(refused, "variant = 'nonsense': must be one of base-512, ")


def test_our_recipe_sees_the_same_tokens_whatever_the_row():
    totals = {
        math.prod((config.train.steps, config.train.batch_size, config.data.sequence_length))
        for name, variant in VARIANTS
        if name in OF_41M and variant != "1m" and not variant.startswith("paper-")
        for config in [load(name, variant)]
    }
    assert totals == {9_080 * 131_072}

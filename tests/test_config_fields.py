"""Fields of a configuration: overridden from the command line, left out, or written in several ways."""

import dataclasses
import json

import jax
import pytest

from tests.test_configs import VARIANTS, from_flags, get_config
from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.config.run import SECTIONS, RunConfig, default_config_dict, run_config, save_config
from tlinformer_jax.config.train import TrainConfig, seconds
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.models import ModelConfig, build_model

# A value for every field, none of them what the config files say.
OVERRIDES = {
    "model": {
        "architecture": "tconstformer",
        "vocab_size": 50300,
        "d_model": 48,
        "num_heads": 6,
        "num_blocks": 3,
        "hidden_depth": 3,
        "d_ff": 64,
        "num_experts": 12,
        "experts_per_token": 3,
        "history_window": "auto",
        "generation_window": 48,
        "window_overlap": 7,
        "longest_wavelength": 90,
        "token_shift": True,
        "key_taps": 2,
        "dropout": 0.25,
        "dtype": "float32",
        "attention": "xla",
        "memory": None,  # the other one
    },
    "train": {
        "steps": 7,
        "batch_size": 48,
        "accumulation": 6,
        "sampled_windows": 2,
        "seed": 11,
        "optimizer": "muon",
        "learning_rate": 0.5,
        "warmup_steps": 5,
        "schedule": "constant",
        "weight_decay": 0.01,
        "z_loss": 0.001,
        "clip_norm": 2.0,
        "ema": 0.99,
        "log_every": 3,
        "eval_every": 4,
        "checkpoint_every": 9,
        "keep_checkpoints": "5+3",
        "max_skipped_updates": 4,
        "deterministic": True,
        "mesh": "fsdp=4,tensor=3,window=5,context=6,expert=2",
    },
    "data": {
        "tokenizer": "/some/tokenizer.json:</s>",
        "dataset": None,  # another one
        "sequence_length": 640,
        "train_files": "/a/*.txt,/b/*.jsonl.gz",
        "validation_files": "/c.txt",
        "test_files": "/d.txt",
        "text_field": "body",
        "examples": 4321,
        "num_items": 5,
    },
}
OTHER = {
    ("model", "memory"): {"auto": "low", "low": "auto"},
    ("data", "dataset"): {"pydoc": "passkey", "text": "passkey", "wikitext103": "passkey"},
}


# Fields that others above leave no other value.
ALONE = {"model": {"causal_history"}, "data": {"curriculum", "document_masking", "shingle"}}


@pytest.mark.parametrize("name", ["tiny.py", "wt103.py", "wt103.py:paper-1k-512-0.5", "books.py", "long.py:1m"])
def test_every_field_can_be_overridden_on_the_command_line(name, tmp_path, monkeypatch):
    """From any directory, and also where the config file sets another value than the default."""
    monkeypatch.chdir(tmp_path)
    before = from_flags(name).to_dict()
    assert {section: set(fields) - ALONE.get(section, set()) for section, fields in before.items()} == {
        section: set(fields) for section, fields in OVERRIDES.items()
    }
    expected = {
        section: {
            field: OTHER[section, field][before[section][field]] if value is None else value
            for field, value in fields.items()
        }
        for section, fields in OVERRIDES.items()
    }
    for section, fields in expected.items():
        assert not [field for field, value in fields.items() if before[section][field] == value]
    arguments = [f"{s}.{field}={value}" for s, fields in expected.items() for field, value in fields.items()]
    found = from_flags(name, *arguments).to_dict()
    assert {section: {field: found[section][field] for field in expected[section]} for section in found} == expected


def test_a_curriculum_can_be_overridden_on_the_command_line():
    found = from_flags("passkey.py:tiny", "data.curriculum=128:5,256:6").data
    assert found.stages == ((128, 5, 0), (256, 6, 0))


def test_documents_can_be_kept_apart_from_the_command_line():
    assert from_flags("tiny.py", "data.document_masking=True").data.document_masking


def test_the_history_can_be_computed_like_the_window_from_the_command_line():
    assert from_flags("tiny.py", "model.causal_history=True").model.causal_history


@pytest.mark.parametrize("name", ["tiny.py", "wt103.py", "books.py:4k-1k-0.5"])
def test_history_window_and_d_ff_take_all_their_types(name):
    assert from_flags(name, "model.history_window=8").model.history_window == 8
    assert from_flags(name, "model.history_window=auto").model.history_window == "auto"
    assert from_flags(name, "model.d_ff=8").model.d_ff == 8
    assert from_flags(name).model.d_ff is None
    assert from_flags(name, "model.d_ff=None").model.d_ff is None


@pytest.mark.parametrize(
    ("value", "every", "time"),
    [("0", 0, 0), ("7", 7, 0), ("10min", "10min", 600), ("30s", "30s", 30), ("1.5h", "1.5h", 5400)],
)
def test_checkpoints_are_counted_in_updates_or_in_time(value, every, time):
    train = from_flags("tiny.py", f"train.checkpoint_every={value}").train
    assert (train.checkpoint_every, seconds(train.checkpoint_every)) == (every, time)
    for wrong in ("10", "-1s", "10days", "0min", "min"):
        with pytest.raises(ConfigError, match=r"train\.checkpoint_every = .*: must be an integer >= 0, or a time"):
            TrainConfig(checkpoint_every=wrong)
    assert from_flags("tiny.py", "train.eval_every=epoch").train.eval_every == "epoch"


README_TEMPLATE = """
from ml_collections import ConfigDict
def get_config():
    return ConfigDict({"train": {"steps": 7, "learning_rate": 1}, "data": {"sequence_length": 64}, "model": MODEL})
"""


@pytest.mark.parametrize("model", ['{"d_model": 32, "num_heads": 4, "history_window": 8}', "{}"])
def test_what_a_config_file_leaves_out_can_be_overridden(model, tmp_path):
    """Whole sections, fields, and with every type that the field takes."""
    path = tmp_path / "mine.py"
    path.write_text(README_TEMPLATE.replace("MODEL", model))
    plain = from_flags(path)
    assert plain == run_config(get_config(path))
    changes = ("train.mesh=fsdp=2", "train.learning_rate=0.5", "model.history_window=auto", "train.batch_size=3")
    found = from_flags(path, *changes)
    assert (found.train.mesh, found.train.batch_size, found.train.steps) == ("fsdp=2", 3, 7)
    assert (found.train.learning_rate, found.model.history_window) == (0.5, "auto")
    assert found.model == dataclasses.replace(plain.model, history_window="auto")


def test_the_vocabulary_is_the_tokenizers_padded_unless_it_is_given(tmp_path):
    sizes = {"bytes": 384, "gpt2": 50304}
    for tokenizer, size in sizes.items():
        found = run_config({"data": {"tokenizer": tokenizer}, "model": {"d_model": 24}})
        assert found.model.vocab_size == size
        save_config(found, tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["model"]["vocab_size"] == size
    assert run_config({"model": {"vocab_size": 300}}).model.vocab_size == 300
    assert from_flags("wt103.py").model.vocab_size == 50257
    assert from_flags("wt103.py", "model.vocab_size=auto").model.vocab_size == 50304


def test_an_empty_configuration_is_small():
    model = build_model(run_config({}).model)
    params = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), "int32"))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) < 1e6


def test_every_field_is_in_every_config_with_the_defaults_of_the_dataclasses():
    defaults = RunConfig(ModelConfig(vocab_size=384), TrainConfig(), DataConfig())
    assert run_config(default_config_dict()) == defaults
    for name, variant in VARIANTS:
        config = get_config(name, variant)
        assert set(config) == set(SECTIONS)
        for section, kind in SECTIONS.items():
            assert set(config[section]) == {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize(
    ("steps", "stored"),
    [
        (7, 7),
        ("1epochs", "1epoch"),
        ("2epoch", "2epochs"),
        ("5000@.990", "5000@0.99"),
        ("5000@1.0", "5000@1"),
        ("3epoch@1.", "3epochs@1"),
    ],
)
def test_equal_steps_are_equal_configurations(steps, stored):
    assert TrainConfig(steps=steps) == TrainConfig(steps=stored)
    assert TrainConfig(steps=steps).steps == stored


@pytest.mark.parametrize("steps", ["5", "٣epochs", "5@0", "5@0.0", "5@1.1", "5@0." + "0" * 400 + "1"])
def test_wrong_steps_are_refused(steps):
    with pytest.raises(ConfigError, match=r"an accuracy at which a task's run ends, such as '5000@0.99'"):
        TrainConfig(steps=steps)


def test_equal_meshes_are_equal_configurations():
    assert TrainConfig(mesh="tensor=2, fsdp=4,window=1") == TrainConfig(mesh="fsdp=4,tensor=2")
    assert TrainConfig(mesh="tensor=2, fsdp=4,window=1").axes == {"fsdp": 4, "tensor": 2}
    assert TrainConfig(mesh=" tensor=2 , fsdp=4 ").mesh == "fsdp=4,tensor=2"
    for wrong in ("fsdp=0", "fsdp 4", "fsdp=2,tensor=3,fsdp=2", "data=2", "fsdp=2,", "fsdp", "fsdp=" + "9" * 5000):
        with pytest.raises(ConfigError, match=r"^train\.mesh = .*: must be '' or AXIS=SIZE"):
            TrainConfig(mesh=wrong)

"""The files that `bad_inputs` names: texts, configurations, weights, working directories with something wrong."""

import dataclasses
import gzip
import json
import os
import pathlib
import shutil
from collections.abc import Callable

import numpy as np

from tests.support import golden
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.interop.files import write_safetensors

MODEL = ModelConfig(
    vocab_size=257,
    d_model=16,
    num_heads=2,
    num_blocks=1,
    hidden_depth=0,
    d_ff=24,
    history_window=8,
    generation_window=8,
    dtype="float32",
)


def _replace_field(path: pathlib.Path, old: str, new: str) -> None:
    text = (path / "config.json").read_text()
    assert old in text
    (path / "config.json").write_text(text.replace(old, new))


def _damage_all(path: pathlib.Path) -> None:
    for file in path.glob("checkpoints/*/state/_METADATA"):
        os.truncate(file, 10)


def _in_place(name: str, folder: bool = False) -> Callable[[pathlib.Path], None]:
    """Puts a file, or a folder, in the place of what has that name."""

    def change(path: pathlib.Path) -> None:
        there = path / name
        if there.is_dir():
            shutil.rmtree(there)
        else:
            there.unlink(missing_ok=True)
        if folder:
            there.mkdir()
        else:
            there.write_bytes(b"\xffnonsense")

    return change


def _behind_link(name: str) -> Callable[[pathlib.Path], None]:
    """Moves what has that name beside its working directory, and puts a link to it in its place."""

    def change(path: pathlib.Path) -> None:
        there, moved = path / name, path.with_name(f"{path.name}_moved")
        if not there.exists():
            there.touch()
        there.rename(moved)
        there.symlink_to(moved)

    return change


def _pipe_as_config(path: pathlib.Path) -> None:
    (path / "config.json").unlink()
    os.mkfifo(path / "config.json")


def _steps_as_links(path: pathlib.Path) -> None:
    for step in list((path / "checkpoints").iterdir()):
        moved = path / f"moved-{step.name}"
        step.rename(moved)
        step.symlink_to(moved)


def _rename_steps(prefix: str) -> Callable[[pathlib.Path], None]:
    def change(path: pathlib.Path) -> None:
        for step in list((path / "checkpoints").iterdir()):
            step.rename(step.with_name(f"{prefix}{step.name}"))

    return change


def _old_layout(path: pathlib.Path) -> None:
    for step in (path / "checkpoints").iterdir():
        (step / "state").rename(step / "default")
        (step / "manifest.json").unlink()


CHANGES: dict[str, Callable[[pathlib.Path], None]] = {
    "other_model": lambda path: _replace_field(path, '"d_model": 16', '"d_model": 32'),
    "config_cut": lambda path: os.truncate(path / "config.json", 100),
    "config_future": lambda path: _replace_field(path, '"d_model"', '"width"'),
    "config_binary": _in_place("config.json"),
    "config_folder": _in_place("config.json", folder=True),
    "config_deep": lambda path: (path / "config.json").write_text("[" * 100_000),
    "config_blocks": lambda path: _replace_field(path, '"num_blocks": 1,', '"num_blocks": 1000000,'),
    "config_d_ff": lambda path: _replace_field(path, '"d_ff": 24', '"d_ff": 16'),
    "config_window": lambda path: _replace_field(path, '"generation_window": 8', '"generation_window": 1000000000'),
    "config_walk": lambda path: _replace_field(path, str(path.parent / "validation.txt"), "/**/*.txt"),
    "config_list": lambda path: (path / "config.json").write_text("[1, 2]"),
    "config_nul": lambda path: _replace_field(path, "validation.txt", "a\\u0000b"),
    "config_half": lambda path: _replace_field(path, "validation.txt", "a\\ud800"),
    "texts_deep": lambda path: (path / "texts.json").write_text("[" * 100_000),
    "tokenizer_binary": _in_place("tokenizer.json"),
    "tokenizer_list": lambda path: (path / "tokenizer.json").write_text("[1, 2]"),
    "tokenizer_gone": lambda path: (path / "tokenizer.json").unlink(),
    "all_damaged": _damage_all,
    "no_checkpoint": lambda path: shutil.rmtree(path / "checkpoints"),
    "checkpoints_empty": _in_place("checkpoints", folder=True),
    "checkpoints_file": _in_place("checkpoints"),
    "metrics_folder": _in_place("metrics.jsonl", folder=True),
    "tensorboard_file": _in_place("tensorboard"),
    "lock_folder": _in_place(".lock", folder=True),
    "lock_link": _behind_link(".lock"),
    "metrics_link": _behind_link("metrics.jsonl"),
    "tensorboard_link": _behind_link("tensorboard"),
    "checkpoints_link": _behind_link("checkpoints"),
    "config_link": _behind_link("config.json"),
    "tokenizer_link": _behind_link("tokenizer.json"),
    "config_pipe": _pipe_as_config,
    "steps_link": _steps_as_links,
    "step_zero": _rename_steps("0"),
    "old_layout": _old_layout,
    "held": lambda path: None,  # its lock is held while the cases run
    "no_text": lambda path: _replace_field(path, "validation.txt", "moved.txt"),
}


def write_files(folder: pathlib.Path) -> None:
    """Fills the folder with all that the cases read, but for the working directories."""
    _write_configs(folder)
    _write_texts(folder)
    _write_weights(folder)
    downloads = folder / "cache" / "damaged" / "downloads"
    downloads.mkdir(parents=True)
    (downloads / "wikitext-103-v1.zip").write_bytes(b"PK")


def _write_configs(folder: pathlib.Path) -> None:
    data = {
        "dataset": "text",
        "tokenizer": "bytes",
        "sequence_length": 32,
        "train_files": str(folder / "train.txt"),
        "validation_files": str(folder / "validation.txt"),
    }
    changed = {field.name: getattr(MODEL, field.name) for field in dataclasses.fields(MODEL)}
    values = {"model": changed, "train": {"steps": 4, "batch_size": 4, "checkpoint_every": 2}, "data": data}
    head = (
        "from tlinformer_jax.config.run import default_config_dict\n\n\ndef get_config():\n"
        f"    values = default_config_dict()\n    for name, fields in {values!r}.items():\n"
        "        values[name].update(fields)\n"
    )
    parts = {
        "small": "    return values\n",
        "nothing": "    return None\n",
        "number": "    return 3\n",
        "raises": "    raise RuntimeError('no luck')\n",
        "section": "    return ConfigDict(values.to_dict() | {'modle': {}})\n",
        "field": "    plain = values.to_dict()\n    plain['model']['widnow'] = 3\n    return ConfigDict(plain)\n",
        "flat": "    return ConfigDict(values.to_dict() | {'model': 3})\n",
        "type": "    plain = values.to_dict()\n    plain['model']['d_model'] = '16'\n    return ConfigDict(plain)\n",
    }
    for name, end in parts.items():
        (folder / f"{name}.py").write_text(f"from ml_collections import ConfigDict\n{head}{end}")
    points = {
        "sweep": "{'one': {}, 'two': {'train.steps': 1}}",
        "sweep_point": "{'one': {}, 'two': {'model.num_heads': 3}}",
        "sweep_field": "{'one': {'model.widnow': 3}}",
        "sweep_empty": "{}",
    }
    for name, text in points.items():
        end = f"    return values\n\n\ndef get_sweep():\n    return Sweep(get_config(), {text})\n"
        (folder / f"{name}.py").write_text(f"from tlinformer_jax.experiments.plan import Sweep\n{head}{end}")
    (folder / "empty.py").write_text("")
    (folder / "syntax.py").write_text("def get_config(:\n")


def _write_texts(folder: pathlib.Path) -> None:
    text = "The quick brown fox jumps over the lazy dog.\n" * 20
    for name in ("train", "validation"):
        (folder / f"{name}.txt").write_text(text)
    (folder / "short.txt").write_text("short")
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(b"one\ntwo\xff\n")
    (folder / "table.csv").write_text("a,b\n")
    (folder / "folder.txt").mkdir()
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "field.jsonl").write_text('{"body": "a"}\n')
    (folder / "number.jsonl").write_text('{"text": 3}\n')
    (folder / "half.jsonl").write_text('{"text": "\\ud800"}\n')
    (folder / "other.json").write_text('{"name": "x"}\n')
    words = {"type": "WordLevel", "vocab": {"fox": 0, "<|endoftext|>": 1}, "unk_token": "fox"}
    (folder / "words.json").write_text(json.dumps({"version": "1.0", "model": words}))
    packed = gzip.compress(text.encode(), mtime=0)
    (folder / "cut.txt.gz").write_bytes(packed[:-10])
    (folder / "damaged.txt.gz").write_bytes(packed[:20] + bytes([packed[20] ^ 255]) + packed[21:])
    for suffix in ("xz", "zst"):
        (folder / f"none.txt.{suffix}").write_bytes(b"this is none" * 9)


def _write_weights(folder: pathlib.Path) -> None:
    weights = golden.random_weights(MODEL)
    norm = "transformer.norm.bias"

    def save(name: str, values: dict) -> None:
        write_safetensors(folder / f"{name}.safetensors", values)

    save("sound", weights)
    save("missing", {name: array for name, array in weights.items() if name != norm})
    save("shape", weights | {norm: np.zeros(3, np.float32)})
    save("infinite", weights | {norm: np.full(16, np.inf, np.float32)})
    data = (folder / "sound.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(data[: len(data) // 2])
    (folder / "nonsense.safetensors").write_bytes(json.dumps("nonsense").encode() * 9)

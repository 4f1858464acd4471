"""Loading a checkpoint, a tokenizer, a working directory or weights of a stranger never executes anything of them."""

import ast
import contextlib
import functools
import gc
import os
import pathlib
import pickle
import shutil
import sys

import jax.numpy as jnp
import pytest

from tests.support import golden
from tests.support.commands import ROOT, command_line, run_line
from tlinformer_jax.config.run import RunConfig, load_config, run_config
from tlinformer_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from tlinformer_jax.interop.files import write_safetensors
from tlinformer_jax.training.checkpoint import restore_params
from tlinformer_jax.training.conversion import weights_to_workdir
from tlinformer_jax.training.setup import build_run

PACKAGE = ROOT / "tlinformer_jax"
# Modules whose purpose is to make objects or code of bytes, and what else runs a text.
MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__", "system", "popen", "execv", "run_path", "run_module"}


def findings(source: str) -> set[str]:
    """What in a module's text could execute data."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found |= {f"import {name}" for name in names if name.split(".")[0] in MODULES}
        if isinstance(node, ast.Call):
            function = node.func
            name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
            owner = getattr(getattr(function, "value", None), "id", "")
            # re.compile, and `.lower(...).compile()` of JAX, compile no text of Python.
            if name in CALLS and not (name == "compile" and isinstance(function, ast.Attribute)):
                found.add(f"call of {name}")
            if name == "import_module" and not (owner == "importlib" and _fixed(node.args[0])):
                found.add("import of a computed name")
            if name == "load" and owner == "torch":
                safe = any(
                    option.arg == "weights_only" and getattr(option.value, "value", 0) is True
                    for option in node.keywords
                )
                found |= set() if safe else {"torch.load of any object"}
            options = {option.arg: option.value for option in node.keywords}
            for option in ("allow_pickle", "shell"):
                if option in options and getattr(options[option], "value", None) is not False:
                    found.add(f"{option}=True")
    return found


def _fixed(argument: ast.expr) -> bool:
    """A literal, or an entry of the package's table of its own names."""
    table = isinstance(argument, ast.Subscript) and getattr(argument.value, "id", "") == "_HOMES"
    return isinstance(argument, ast.Constant) or table


def test_the_search_finds_what_it_looks_for():
    for source in (
        "import pickle",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "from pickle import loads",
        "eval(x)",
        "os.system(x)",
        "np.load(f, allow_pickle=True)",
        "subprocess.run(x, shell=True)",
        "importlib.import_module(name)",
        "def f():\n    import marshal",
    ):
        assert findings(source), source
    assert not findings("import re\nre.compile('x')\nnp.load(f, allow_pickle=False)\nevaluate(x)")


def test_nothing_in_the_package_executes_data():
    found = {str(path.relative_to(PACKAGE)): findings(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert len(found) > 90
    # A config or sweep file is a program of the user's own.
    assert {name: what for name, what in found.items() if what} == {"config/named.py": {"call of run_path"}}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    """A small working directory, complete."""
    folder = tmp_path_factory.mktemp("security")
    fields = {"vocab_size": 257, "d_model": 16, "num_heads": 2, "num_blocks": 1, "hidden_depth": 0, "d_ff": 24}
    config = run_config({"model": fields | {"history_window": 8, "generation_window": 8}})
    write_safetensors(folder / "x.safetensors", golden.random_weights(config.model))
    weights_to_workdir(folder / "x.safetensors", config, folder / "run")
    return folder / "run"


@functools.cache
def abstract_params(config: RunConfig):
    """Shapes of the parameters; nothing is read for them."""
    return build_run(config, ByteTokenizer()).abstract_state.params


def load_all(workdir: pathlib.Path):
    """Everything that evaluation and generation read of a working directory."""
    load_tokenizer(workdir)
    return restore_params(workdir, abstract_params(load_config(workdir)))[1]


# In a process of its own, as an audit hook cannot be taken away again.
WATCHED = """
import pathlib, pickle, sys
from tests import test_security
from tlinformer_jax.interop.files import read_weights
def refuse(*_, **__):
    raise AssertionError("pickle was used")
def watch(event, arguments):
    if event in ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen"):
        print("EVENT", event, arguments)
def load():
    test_security.load_all(pathlib.Path(sys.argv[1]))
    read_weights(pathlib.Path(sys.argv[1]).parent / "x.safetensors")
load()  # imports what is imported lazily
kept = pickle.loads
pickle.Unpickler = pickle._Unpickler = pickle.load = pickle.loads = refuse
sys.addaudithook(watch)
if len(sys.argv) > 2:
    kept(pickle.dumps(print, 0))
load()
print("LOADED")
"""


@pytest.mark.parametrize("control", [False, True])
def test_restoring_uses_no_pickle_and_starts_nothing(workdir, control):
    """With pickle made to raise and the interpreter's own audit of it; `control` shows that the audit would tell."""
    _, environment = command_line("none")
    line = [sys.executable, "-c", WATCHED, str(workdir), *["control"] * control]
    result = run_line(line, environment)
    assert result.returncode == 0, result.stderr
    events = result.stdout.splitlines()
    assert events.pop() == "LOADED"
    assert [event.split()[:2] for event in events] == [["EVENT", "pickle.find_class"]] * control


class Malicious:
    def __init__(self, marker: pathlib.Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


# Orbax's, of its broken-off reading.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")
def test_a_working_directory_full_of_malicious_pickles(workdir, tmp_path):
    """Each of its files in turn is one, and then all: whatever loading says, nothing of them has run."""
    marker = tmp_path / "executed"
    attack = pickle.dumps(Malicious(marker))
    pickle.loads(attack)
    assert marker.exists(), "the attack must be one"
    marker.rmdir()
    names = [path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file()]
    assert len(names) > 5
    for number, replaced in enumerate([*([name] for name in names), names]):
        copy = tmp_path / f"run{number}"
        shutil.copytree(workdir, copy)
        for name in replaced:
            (copy / name).write_bytes(attack)
        with contextlib.suppress(Exception):
            load_all(copy)
        assert not marker.exists(), replaced
        shutil.rmtree(copy)
    gc.collect()  # now, so that its warnings belong to this test
    assert not marker.exists()
    assert jnp.isfinite(load_all(workdir)["embedding"]).all()

"""What the package imports as it starts, and the console script."""

import ast
import importlib.metadata
import os
import re
import sys
import tomllib

from tests.support.commands import ROOT, run_line

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Of distributions whose module has another name.
MODULES = {"absl-py": "absl", "orbax-checkpoint": "orbax"}
# Imported by the report alone (tests/experiments/test_frame.py), by the file that stands for itself, and by a class of
# another package's.
ALONE = {f"tlinformer_jax/experiments/{name}.py": ["pandas"] for name in ("figures", "frame", "report", "retrieval")}
ALONE |= {"tlinformer_jax/interop/pytorch.py": ["torch"], "tlinformer_jax/interop/harness.py": ["lm_eval"]}


def imported_at_once(source: str) -> set[str]:
    """Packages that a module imports when it is imported itself: not inside a function, not for types only."""
    found: set[str] = set()
    todo = list(ast.parse(source).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                continue
            todo += ast.iter_child_nodes(node)
    return found


def test_optional_packages_are_imported_where_they_are_used():
    """So that pandas, TensorFlow, PyTorch or matplotlib may be absent until someone asks for what needs them."""
    required = [re.match(r"[\w-]+", dependency)[0] for dependency in PROJECT["dependencies"]]
    allowed = {MODULES.get(name, name) for name in required} | sys.stdlib_module_names | {"tlinformer_jax"}
    found = {
        str(path.relative_to(ROOT)): sorted(imported_at_once(path.read_text()) - allowed)
        for path in (ROOT / "tlinformer_jax").rglob("*.py")
    }
    assert len(found) > 90
    assert {name: extra for name, extra in found.items() if extra} == ALONE


def test_requirements_are_those_of_pyproject():
    declared = {
        *PROJECT["dependencies"],
        *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
    }
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    required = set(filter(None, lines))
    assert set(PROJECT["dependencies"]) <= required <= declared


def test_the_search_sees_what_it_should():
    assert imported_at_once("try:\n    import torch.nn\nexcept ImportError:\n    pass") == {"torch"}
    assert imported_at_once("class A:\n    from pandas import x") == {"pandas"}
    assert imported_at_once("def f():\n    import torch\nif TYPE_CHECKING:\n    import clu") == set()


def test_training_does_not_import_pytorch_though_tensorboardx_would(tmp_path):
    (tmp_path / "torch.py").write_text("Tensor = int\nprint('imported')")
    script = "import tlinformer_jax.training.loop; print('by us'); import torch"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = run_line([sys.executable, "-c", script], os.environ | {"PYTHONPATH": path})
    assert done.stdout.split() == ["by", "us", "imported"], done.stderr


def test_the_console_script_is_a_command():
    assert PROJECT["scripts"]["tlinformer"]
    entry = importlib.metadata.EntryPoint("tlinformer", PROJECT["scripts"]["tlinformer"], "console_scripts")
    assert callable(entry.load())


def listed_modules(docstring: str) -> set[str]:
    """The entries of a package's docstring: `a  text`, `a, b  text`, and `a: text` after a semicolon."""
    found: set[str] = set()
    for line in docstring.splitlines():
        if entry := re.match(r"(\w+(?:, \w+)*)  +\S", line):
            found |= set(entry[1].split(", "))
        found |= {name for names in re.findall(r"; (\w+(?:, \w+)*)(?=:)", line) for name in names.split(", ")}
    return found


def test_entries_of_a_docstring_are_not_words_of_its_text():
    text = (
        "Of parts.\n\na, b   text of c and d: e; f: its text; g, h: theirs; i: it\nj  one; k\nno entry; nor this word"
    )
    assert listed_modules(text) == {*"abfghij"}


def test_a_package_that_lists_its_modules_lists_them_all():
    left_out = {}
    for init in (ROOT / "tlinformer_jax").glob("*/__init__.py"):
        listed = listed_modules(ast.get_docstring(ast.parse(init.read_text())))
        modules = {path.stem for path in init.parent.glob("*.py")} - {"__init__"}
        if len(modules & listed) > len(modules) / 2:
            left_out[init.parent.name] = modules - listed
    assert len(left_out) > 5
    assert not {name: modules for name, modules in left_out.items() if modules}

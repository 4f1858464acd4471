"""Checks that every name of our packages that the notebook and the pages use exists, without running them."""

import ast
import inspect
import json
import pkgutil
from collections.abc import Iterator

from tests.docs.blocks import blocks, pages
from tests.launch.test_notebook import NOTEBOOK, code_cells

OURS = ("tlinformer_jax", "benchmarks", "tools")


def sources() -> Iterator[tuple[str, str]]:
    """Yields the file name and the Python code of the notebook and of each page."""
    cells = ["".join(cell["source"]) for cell in code_cells(json.loads(NOTEBOOK.read_text()))]
    lines = "\n".join(cells).splitlines()
    yield NOTEBOOK.name, "\n".join(line for line in lines if not line.startswith("%"))  # commands of IPython
    for page in pages():
        yield page.name, "\n".join(block.text for block in blocks(page) if block.language in ("python", "py"))


def has(owner: object, name: str) -> bool:
    """Returns whether a module or a class has the attribute; fields of dataclasses need no value."""
    return hasattr(owner, name) or name in getattr(owner, "__annotations__", {})


def named(path: str) -> object | None:
    """Returns the object at a dotted path; None if there is none."""
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return None


def missing(source: str) -> list[str]:
    """Returns the imports from our packages, and the attributes of imported names, that do not exist."""
    nodes = list(ast.walk(ast.parse(source)))
    paths: dict[str, str] = {}  # name -> what it is bound to
    imports: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            imports += [alias.name for alias in node.names]
            for alias in node.names:  # `import a.b` binds a, `import a.b as c` binds c to a.b
                package = alias.name.split(".")[0]
                paths[alias.asname or package] = alias.name if alias.asname else package
        elif isinstance(node, ast.ImportFrom):
            paths |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            imports += [f"{node.module}.{alias.name}" for alias in node.names]
    names = {name: named(path) for name, path in paths.items() if path.split(".")[0] in OURS}
    found = [path for path in imports if path.split(".")[0] in OURS and named(path) is None]
    for node in nodes:
        if isinstance(node, ast.Attribute):
            owner = value_of(node.value, names)
            if (inspect.ismodule(owner) or inspect.isclass(owner)) and not has(owner, node.attr):
                found.append(ast.unparse(node))
    return found


def value_of(node: ast.expr, names: dict[str, object]) -> object | None:
    """Returns the value of an expression such as `a.b` over the imported names; None for other expressions."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        return getattr(value_of(node.value, names), node.attr, None)
    return None


def test_every_name_that_is_shown_exists():
    found = {where: missing(text) for where, text in sources()}
    assert len(found) > 10
    assert {where: names for where, names in found.items() if names} == {}


def test_the_search_sees_what_it_should():
    assert missing("from tlinformer_jax.decoding.cache import cache_bytes_at") == [
        "tlinformer_jax.decoding.cache.cache_bytes_at"
    ]
    assert missing("from tlinformer_jax.nowhere import x\nimport tools.nothing") == [
        "tlinformer_jax.nowhere.x",
        "tools.nothing",
    ]
    assert missing("import tlinformer_jax as t\nt.build_model\nt.build_modle(3)") == ["t.build_modle"]
    assert missing("from tlinformer_jax.decoding import Generator\nGenerator.from_nowhere(x).y") == [
        "Generator.from_nowhere"
    ]
    assert missing("from tlinformer_jax import ModelConfig, decoding\ndecoding.Generator(ModelConfig.d_model)") == []

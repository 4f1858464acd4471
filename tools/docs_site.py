"""An mkdocs hook that generates the reference pages from the code, and checks and links the fields that pages name.

Commands, flags, configuration fields and public names are read from the package, so that a page cannot name something
that does not exist: a warning here fails `mkdocs build --strict`.
"""

import ast
import dataclasses
import importlib
import inspect
import json
import logging
import pathlib
import posixpath
import re
import subprocess
import sys
from typing import Any

log = logging.getLogger("mkdocs.hooks.site")
PAGE = "reference/configuration.md"
# Modules whose `__all__` is documented, and the equations of the block.
PUBLIC = {
    "tlinformer_jax": "The package itself: models, a whole training, a run that is loaded.",
    "tlinformer_jax.decoding": "Generation.",
    "tlinformer_jax.interop": "Weights under the published checkpoint's names.",
    "tlinformer_jax.models.block": "The paper's block: one function for each kind of layer.",
    "tlinformer_jax.config.run": "The configuration of a run.",
    "tlinformer_jax.errors": "Errors that a user can correct.",
}
CHOSEN = {
    "tlinformer_jax.models.block": ("compress", "hidden", "restore"),
    "tlinformer_jax.config.run": ("RunConfig", "run_config"),
    "tlinformer_jax.errors": ("UserError", "ConfigError", "DataError"),
}
# Values that no field accepts; the error message for them says what is allowed.
PROBES: tuple[Any, ...] = ("?", -7, 0, -1.5, 10**30, True, [])
FIELD = re.compile(r"(?<!\[)`((?:model|train|data)\.[a-z_]+)`")
# Links to the package's code lead to the code on GitHub, and on the site to the page that is generated from it.
CODE = re.compile(r"\]\((?:\.\./)+tlinformer_jax/(\w+)[^)]*\)")
PAGES = {"commands": "reference/commands.md", "config": PAGE}  # other folders: the Python API
REPORT = "results.md"
# Files in the repository's root that are also pages.
PROJECT = ("CONTRIBUTING.md", "DEVELOPERS.md", "CHANGELOG.md")
# Pages about earlier versions.
UNCHECKED = ("performance.md", REPORT, "reliability.md", "changelog.md")


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages."""
    from mkdocs.structure.files import File

    written = {PAGE: configuration(), "reference/commands.md": commands(), "reference/api.md": api()}
    for name, text in (written | project_pages(pathlib.Path(config.config_file_path).parent)).items():
        files.append(File.generated(config, name, content=text))
    return files


def project_pages(root: pathlib.Path) -> dict[str, str]:
    """Returns CONTRIBUTING.md and similar files as pages, with links relative to the folder of pages."""
    pages = {}
    for name in PROJECT:
        text = (root / name).read_text().replace("](docs/", "](")
        for other in PROJECT:
            text = text.replace(f"]({other})", f"]({other.lower()})")
        pages[name.lower()] = text
    return pages


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links `section.field` and the package's code to the reference; a field that does not exist is a warning."""
    if page.file.src_uri == REPORT:
        page.meta["hide"] = ["toc"]  # its tables need the space
    if page.file.src_uri in (*UNCHECKED, PAGE):
        return markdown
    known, here = fields(), posixpath.dirname(page.file.src_uri)

    def link(match: re.Match[str]) -> str:
        if match[1] not in known:
            log.warning("%s: there is no field %s", page.file.src_uri, match[1])
            return match[0]
        return f"[`{match[1]}`]({posixpath.relpath(PAGE, here or '.')}#{match[1]})"

    def code(match: re.Match[str]) -> str:
        return f"]({posixpath.relpath(PAGES.get(match[1], 'reference/api.md'), here or '.')})"

    markdown = re.sub(r"^:source: (\S+)$", lambda match: source(match[1]), markdown, flags=re.MULTILINE)
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else FIELD.sub(link, CODE.sub(code, part)) for part in parts)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Marks the report for the style sheet, because its tables are wide."""
    return f'<div class="report">{html}</div>' if page.file.src_uri == REPORT else html


def source(path: str) -> str:
    """Returns the code of a function, without its docstring, as a fenced block."""
    module, _, name = path.rpartition(".")
    text = inspect.getsource(getattr(importlib.import_module(module), name))
    tree = ast.parse(text).body[0]
    assert isinstance(tree, ast.FunctionDef)
    lines, first = text.splitlines(), tree.body[0]
    if ast.get_docstring(tree):
        del lines[first.lineno - 1 : first.end_lineno]
    return "\n".join(["```python", *lines, "```"])


def sections() -> dict[str, Any]:
    """Returns the dataclass of each section."""
    from tlinformer_jax.config.run import SECTIONS

    return dict(SECTIONS)


def fields() -> set[str]:
    """Returns every `section.field`."""
    return {f"{name}.{field.name}" for name, kind in sections().items() for field in dataclasses.fields(kind)}


def configuration() -> str:
    """Returns the page of all fields, with defaults, allowed values and the docstring's text."""
    lines = [
        "# Configuration",
        "",
        "Every field of a run, written from the code. A config file sets some of them, `--config.SECTION.FIELD=VALUE`",
        "overrides them on the command line, and what nobody sets has the default below. [Train on your",
        "text](../guides/your_text.md) shows a whole config file.",
        "",
    ]
    for section, kind in sections().items():
        summary, meanings = described(inspect.getdoc(kind) or "")
        lines += [
            f"## {section}",
            "",
            escaped(summary),
            "",
            "| field | default | allowed | meaning |",
            "|---|---|---|---|",
        ]
        for field in dataclasses.fields(kind):
            if field.name not in meanings:
                log.warning("%s.%s is not described in the docstring of %s", section, field.name, kind.__name__)
            lines.append(
                f'| <span id="{section}.{field.name}"></span>`{field.name}` | `{field.default!r}` '
                f"| {escaped(allowed(section, kind, field))} | {escaped(meanings.get(field.name, ''))} |"
            )
        lines.append("")
    return "\n".join(lines)


def described(docstring: str) -> tuple[str, dict[str, str]]:
    """Returns the text before `Attributes:`, and that section's text for each attribute."""
    summary, _, rest = docstring.partition("Attributes:")
    rest = re.split(r"^\S", rest, maxsplit=1, flags=re.MULTILINE)[0]
    found = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", rest, flags=re.MULTILINE)
    return " ".join(summary.split()), {name: " ".join(text.split()) for name, text in found}


def allowed(section: str, kind: Any, field: Any) -> str:
    """Returns what refusals of wrong values say that the field must be; else its type."""
    from tlinformer_jax.errors import ConfigError

    said: list[str] = []
    for value in PROBES:
        try:
            kind(**{field.name: value})
        except ConfigError as error:
            if error.field == f"{section}.{field.name}" and not error.allowed.startswith("must be of type"):
                said.append(error.allowed)
        except (TypeError, OverflowError, AttributeError):
            continue
    said = list(dict.fromkeys(text.removeprefix("must be ").removeprefix("a ") for text in said))
    choices = [text for text in said if text.startswith("one of ")]
    said = [
        text for text in said if text not in choices[1:] and not any(text in other for other in said if other != text)
    ]
    type_name = getattr(field.type, "__name__", str(field.type))
    return "; ".join(said) if said else type_name.replace("|", "or").replace("str", "text")


def escaped(text: str) -> str:
    """Returns text for a table cell; identifiers in it stay as they are."""
    parts = re.split(r"(`[^`]*`)", text.replace("|", "\\|"))
    return "".join(
        part if part.startswith("`") else re.sub(r"([*_])", r"\\\1", part).replace("<", "&lt;") for part in parts
    )


# Prints the flags of one command as JSON; runs in its own process, because absl's flags are global.
FLAGS_OF = """
import importlib, json, sys
from absl import flags
before = set(flags.FLAGS)
module = importlib.import_module(sys.argv[1])
sys.argv = [sys.argv[0]]
if hasattr(module, "define_flags"):
    module.define_flags()
found = [(f.name, f.default, f.help) for f in (flags.FLAGS[n] for n in flags.FLAGS if n not in before)]
ours = {f.name for m, fs in flags.FLAGS.flags_by_module_dict().items() if m.startswith(("tlinformer_jax", "ml_coll")) or
        m == sys.argv[0] or m == "-c" for f in fs}
print(json.dumps([module.__doc__, [(n, None if d is None else str(d), h) for n, d, h in found if n in ours]]))
"""


def commands() -> str:
    """Returns the page of all commands with their flags."""
    from tlinformer_jax.__main__ import _HOMES

    lines = [
        "# Commands",
        "",
        "`tlinformer COMMAND` and `python -m tlinformer_jax COMMAND` are the same. This page comes from their flags.",
        "Beside `--config`, single fields of the [configuration](configuration.md) can be set:",
        "`--config.SECTION.FIELD=VALUE`.",
        "",
    ]
    for name, module in _HOMES.items():
        if name == "check":
            lines += ["## check", "", "The same as [train](#train) with `--check`: says what a run would take.", ""]
            continue
        found = subprocess.run([sys.executable, "-c", FLAGS_OF, module], capture_output=True, text=True, check=False)
        if found.returncode:
            log.warning("flags of %s: %s", name, found.stderr[-300:])
            continue
        text, flags = json.loads(found.stdout.splitlines()[-1])
        summary = " ".join((text or "").strip().partition("\n\n")[0].split())
        usage = "`tlinformer train " if module == "tlinformer_jax.main" else "`tlinformer "
        lines += [f"## {name}", "", re.sub(r"`python -m tlinformer_jax(\.main)? ", usage, summary), ""]
        if flags:
            lines += ["| flag | default | meaning |", "|---|---|---|"]
            for flag, default, meaning in flags:
                shown = "" if default in (None, "", "[]", "False") else f"`{default}`"
                lines.append(f"| `--{flag}` | {shown} | {escaped(' '.join(meaning.split()))} |")
            lines.append("")
    return "\n".join(lines)


def api() -> str:
    """Returns the page of public names, each rendered from the module that defines it."""
    lines = [
        "# Python API",
        "",
        "Public names, from their docstrings. A name is imported from the module it stands under.",
        "",
    ]
    for module, summary in PUBLIC.items():
        home = importlib.import_module(module)
        names = CHOSEN.get(module) or [name for name in home.__all__ if not name.startswith("_")]
        lines += [f"## {module}", "", summary, ""]
        for name in names:
            target = getattr(home, name)
            if not hasattr(target, "__qualname__"):
                continue
            path = f"{target.__module__}.{target.__qualname__}"
            if path != f"{module}.{name}":
                lines += [f"[](){{#{module}.{name}}}", ""]
            lines += [f"::: {path}", ""]
    return "\n".join(lines)

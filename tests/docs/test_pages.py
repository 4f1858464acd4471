"""README and the site: Python blocks run, commands have the flags that pages show, links lead somewhere."""

import inspect
import logging
import os
import re
import subprocess
import sys
import types

import pytest

from tests.docs.blocks import ROOT, blocks, needs_of, pages
from tests.support.commands import TIMEOUT
from tests.support.compilation import quick_flags
from tlinformer_jax import train_and_evaluate
from tools import docs_site


def run_module(name, folder, *arguments, text=""):
    """Runs a module of the tests in `folder`, on one CPU device."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick_flags()}
    line = [sys.executable, "-m", name, *map(str, arguments)]
    return subprocess.run(
        line, cwd=folder, env=environment, input=text, capture_output=True, text=True, check=False, timeout=TIMEOUT
    )


def runs(page):
    """Whether the package has what the page says that it needs."""
    return set(needs_of(page)) <= set(inspect.signature(train_and_evaluate).parameters)


def commands():
    """Every command of a bash block; a line that ends in a backslash goes on."""
    for page in pages():
        for block in blocks(page) if runs(page) else ():
            if block.language == "bash":
                for line in block.text.replace("\\\n", " ").splitlines():
                    yield from (part.strip() for part in line.split("&&") if not line.startswith("#") and line.strip())


@pytest.mark.slow
@pytest.mark.long
def test_python_blocks_run_and_print_what_they_show(tmp_path):
    found = run_module("tests.docs.run_python", tmp_path, *pages())
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
    assert (tmp_path / "my_text.py").exists()


def test_commands_have_the_flags_that_pages_show(tmp_path):
    os.symlink(ROOT / "configs", tmp_path / "configs")
    for page in pages():
        for block in blocks(page):
            if block.language == "python" and block.title:
                (tmp_path / block.title).write_text(block.text)
    lines = list(dict.fromkeys(commands()))
    assert len(lines) > 40
    wrong = ["tlinformer train --no_such_flag", "tlinformer train --config=configs/tiny.py --config.model.num_heads=7"]
    wrong += ["tlinformer evaluate --workdir=x --config.model.d_model=3", "pip install -e '.[nothing]'", "rm -rf x"]
    found = run_module("tests.docs.parse_commands", tmp_path, text="\n".join([*lines, *wrong]))
    refused = [line for line in found.stdout.splitlines() if not any(line.startswith(command) for command in wrong)]
    assert not refused, refused
    assert found.returncode == len(wrong), found.stdout + found.stderr


def test_readme_is_short_and_all_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 7_000
    assert len(re.findall(r"\]\(", text)) > 20
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):  # as GitHub shows them
        links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
        lost = [link for link in links if not link.startswith("https://") and not (page.parent / link).exists()]
        assert not lost, (page, lost)


def test_reference_pages_hold_every_field_and_command():
    page = docs_site.configuration()
    for field in docs_site.fields():
        assert f'id="{field}"' in page
    (row,) = (line for line in page.splitlines() if 'id="model.attention"' in line)
    assert "one of auto, xla, cudnn, splash" in row
    assert "backend of the attention kernel" in row
    text = docs_site.commands()
    assert "`--temperature`" in text
    assert "## sweep" in text


def test_links_to_the_code_lead_to_the_reference_on_the_site():
    page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri="guides/x.md"))
    text = "[a](../../tlinformer_jax/config/data.py) [b](../../tlinformer_jax/commands) [c](../../tlinformer_jax/a.py)"
    wanted = "[a](../reference/configuration.md) [b](../reference/commands.md) [c](../reference/api.md)"
    assert docs_site.on_page_markdown(text, page) == wanted


@pytest.mark.parametrize(("text", "says"), [("`train.steps`", ""), ("`train.step`", "there is no field train.step")])
def test_a_page_that_names_a_field_links_it_or_is_refused(text, says, caplog):
    page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri="guides/x.md"))
    with caplog.at_level(logging.WARNING):
        linked = docs_site.on_page_markdown(text, page)
    assert says in caplog.text
    assert bool(caplog.text) == bool(says)
    assert linked == (text if says else "[`train.steps`](../reference/configuration.md#train.steps)")

"""The wheel and the sdist, installed into clean environments and used from another directory."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest

from tests.support.commands import ROOT, TIMEOUT
from tests.support.compilation import quick_flags
from tests.support.optional import need_modules

pytestmark = pytest.mark.slow  # .ci/run installs what builds packages for these alone
SHRUNK = (
    "--config.model.d_model=16",
    "--config.model.num_heads=2",
    "--config.model.num_blocks=1",
    "--config.data.sequence_length=64",
    "--config.train.steps=2",
)


def run(*line: str | pathlib.Path, cwd: pathlib.Path, status: int = 0) -> subprocess.CompletedProcess:
    """Runs a program, without the checkout on Python's path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick_flags()}
    done = subprocess.run(
        list(map(str, line)), cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, pathlib.Path]:
    """The sdist, the wheel, which `build` makes from the sdist, and that of an editable installation, by kind."""
    need_modules("build", "hatchling", "twine", extra="package")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", f"--outdir={folder}", ROOT, cwd=folder)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    (folder / "editable").mkdir()
    script = f"import hatchling.build; hatchling.build.build_editable({str(folder / 'editable')!r})"
    run(sys.executable, "-c", script, cwd=ROOT)
    (editable,) = (folder / "editable").iterdir()
    return {"wheel": wheel, "sdist": sdist, "editable": editable}


def installed(package: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The programs of a new environment that holds this package alone, and borrows what it needs from this one."""
    run(sys.executable, "-m", "venv", "--without-pip", folder / "clean", cwd=folder)
    python = folder / "clean" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", package, cwd=folder)
    (site,) = (folder / "clean" / "lib").glob("python*/site-packages")
    # A .pth file that lies in the borrowed folder, such as that of an editable installation, is not read.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n" + extra_paths(site))
    return python.parent


def extra_paths(own: pathlib.Path) -> str:
    """Other folders that this Python's packages come from, but the checkout."""
    folders = [path for path in sys.path if path.endswith("-packages") and pathlib.Path(path) != own]
    return "\n".join(folders) + "\n"


def place_of_package(programs: pathlib.Path, cwd: pathlib.Path) -> pathlib.Path:
    found = run(programs / "python", "-c", "import tlinformer_jax as t; print(t.__file__)", cwd=cwd)
    return pathlib.Path(found.stdout.strip())


def test_metadata_are_sound(built):
    run(sys.executable, "-m", "twine", "check", "--strict", built["wheel"], built["sdist"], cwd=ROOT)


def test_what_is_in_them(built):
    """Every module, every config file as it is written; no tests, no benchmarks."""
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "tlinformer_jax").rglob("*.py")}
    configs = {path.name: path.read_bytes() for path in (ROOT / "configs").glob("*.py")}
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        for name, text in configs.items():
            assert wheel.read(f"tlinformer_jax/configs/{name}") == text
    expected = modules | {f"tlinformer_jax/configs/{name}" for name in configs}
    assert names == expected | {"tlinformer_jax/experiments/report.md"}
    with tarfile.open(built["sdist"]) as sdist:
        tops = {name.split("/")[1] for name in sdist.getnames()}
    assert {"tlinformer_jax", "configs", "README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml"} <= tops
    assert not {"tests", "docs", "benchmarks"} & tops


def test_installed_it_trains_evaluates_and_generates_from_another_directory(built, tmp_path):
    programs = installed(built["wheel"], tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert place_of_package(programs, elsewhere).is_relative_to(tmp_path / "clean")

    tlinformer = programs / "tlinformer"
    run(tlinformer, "train", "--config=tiny", "--workdir=run", *SHRUNK, cwd=elsewhere)
    evaluated = run(tlinformer, "evaluate", "--workdir=run", "--json", cwd=elsewhere)
    assert json.loads(evaluated.stdout)["step"] == 2
    generated = run(
        tlinformer, "generate", "--workdir=run", "--prompt=The", "--max_new_tokens=3", "--json", cwd=elsewhere
    )
    assert len(json.loads(generated.stdout)["tokens"]) == 3
    module = run(programs / "python", "-m", "tlinformer_jax", "evaluate", "--workdir=run", "--json", cwd=elsewhere)
    assert module.stdout == evaluated.stdout
    # A variant by name, and a file of the user's own.
    text = ("--config.data.dataset=pydoc", "--config.data.tokenizer=bytes")
    checked = run(tlinformer, "check", "--config=wt103:paper-1k-512-0.5", *text, cwd=elsewhere)
    assert "40,982,544 parameters" in checked.stdout
    shutil.copy(ROOT / "configs" / "tiny.py", elsewhere / "mine.py")
    run(tlinformer, "check", "--config=mine.py", *SHRUNK, cwd=elsewhere)
    assert "one of audio, books, copy" in run(tlinformer, "check", "--config=none", cwd=elsewhere, status=2).stderr
    assert sorted(path.name for path in elsewhere.iterdir()) == ["mine.py", "run"]


def test_an_editable_installation_is_the_checkout_and_knows_its_configs(built, tmp_path):
    programs = installed(built["editable"], tmp_path)
    assert place_of_package(programs, tmp_path) == ROOT / "tlinformer_jax" / "__init__.py"
    assert "parameters" in run(programs / "tlinformer", "check", "--config=tiny", cwd=tmp_path).stdout
    (own,) = (tmp_path / "clean" / "lib").glob("python*/site-packages/tlinformer_jax-*.dist-info")
    assert not (own.parent / "tlinformer_jax").exists()

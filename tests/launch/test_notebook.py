"""The notebook of launch/: the outputs that it is kept with, and a run of it on the CPU with few updates.

    python -m tests.launch.test_notebook

makes the outputs anew, on the CPU.
"""

import base64
import io
import json
import os
import pathlib
import re
import socket
import subprocess
import tempfile

import numpy as np
import pytest
from packaging.requirements import Requirement

from tests.support.commands import ROOT
from tests.support.compilation import quick_flags
from tests.support.optional import need_modules

NOTEBOOK = ROOT / "launch" / "colab_tpu.ipynb"
FEW = {"STEPS": 8, "LENGTHS": [64, 96], "NEW_TOKENS": 60, "SAMPLES": 16}
FIGURES = 5
PROMPT = len("The for statement ")


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(notebook: dict) -> str:
    """What the cells wrote on stdout and stderr."""
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    return "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


def pictures(notebook: dict) -> list[bytes]:
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    return [
        base64.b64decode(output["data"]["image/png"]) for output in outputs if "image/png" in output.get("data", {})
    ]


def check_outputs(notebook: dict, steps: int, new_tokens: int) -> None:
    """What every run must show, whatever its numbers are."""
    cells, text = code_cells(notebook), printed(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    for line in (
        "window 0:   0 tokens of history, summary from none",
        "window 1:  32 tokens of history, summary from rows 16 to 31",
        "window 3:  96 tokens of history, summary from rows 80 to 95",
        "first logits that change: those at token 40",
        f"step {steps}/{steps}",
    ):
        assert line in text
    # H = 1 and H = 2: 1 / (H + 2) of the Transformer's cache.
    assert re.findall(r"1,000,000 tokens: .* (0\.\d+) of it", text) == ["0.33", "0.25"]
    changes = re.search(r"largest change in each window: \[(.*)\]", text).group(1).split()
    assert float(changes[0]) == 0
    assert min(map(float, changes[1:])) > 0
    # The last token is drawn and not fed; the first window of 32 has room for what the prompt leaves.
    slides = (PROMPT + new_tokens - 2) // 32
    assert f"--- {new_tokens} tokens: {new_tokens - 1} hits and {slides} slides" in text
    assert float(re.search(r"largest difference of a log-probability: (\S+)", text).group(1)) < 1e-4
    left = re.findall(r"history left: (.+?) +(\d\.\d+) nats per byte", text)
    assert [what for what, _ in left] == ["0 rows", "16 rows", "32 rows", "64 rows", "all of it"]
    # A slide is a difference of two times, which on a busy machine can be anything.
    times = re.findall(
        r"after +[\d,]+ tokens: TLinFormer, hit (\S+) ms, .*slide (\S+) ms, .*Transformer (\S+) ms", text
    )
    assert times
    assert all(float(hit) > 0 and float(plain) > 0 for hit, _, plain in times)
    check_pictures(notebook)


def check_pictures(notebook: dict) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    found = pictures(notebook)
    assert len(found) == FIGURES
    for picture in found:
        pixels = plt.imread(io.BytesIO(picture))
        assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 20, "an empty picture"


def test_it_is_kept_with_the_outputs_of_one_run():
    notebook = json.loads(NOTEBOOK.read_text())
    (steps,) = re.findall(r"^STEPS = (\d+)$", "".join(code_cells(notebook)[1]["source"]), re.MULTILINE)
    (new_tokens,) = re.findall(r"^NEW_TOKENS = (\d+)$", "".join(code_cells(notebook)[1]["source"]), re.MULTILINE)
    check_outputs(notebook, int(steps), int(new_tokens))
    assert NOTEBOOK.stat().st_size < 300_000
    text = printed(notebook)
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", text)
    assert not re.search(r"/(work|home|root|tmp|Users|content|var|opt)/", text), "paths of a machine"
    # A model that has learned: better than counting bytes, and worse without its history.
    (bits,) = re.findall(r"^(\d\.\d+) bits per byte of held-out text", printed(notebook), re.MULTILINE)
    assert float(bits) < 3.5
    left = [float(loss) for loss in re.findall(r"history left: .+? +(\d\.\d+) nats per byte", printed(notebook))]
    assert left[0] > left[-1]


@pytest.mark.parametrize(
    ("package", "extras", "url"),
    [
        ("tlinformer-jax", {"bench"}, None),
        ("git+https://example.org/tlinformer_jax", {"bench"}, "git+https://example.org/tlinformer_jax"),
        ("dist/tlinformer_jax-0.1.0-py3-none-any.whl", {"bench"}, None),
        (".", {"bench"}, None),
    ],
)
def test_pip_is_asked_for_the_package_where_it_is_missing(package, extras, url, monkeypatch):
    source = next(cell for cell in code_cells(json.loads(NOTEBOOK.read_text())) if "def requirement" in str(cell))
    asked = []

    def run(command, **_):
        if command[0] == "nvidia-smi":
            raise FileNotFoundError
        asked.append(command)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    exec("".join(source["source"]), {"PACKAGE": package})
    (command,) = asked
    assert command[1:4] == ["-m", "pip", "install"]
    wanted = command[-1]
    if (os.sep in package and url is None) or package == ".":  # a path, which is no requirement by name
        assert wanted == f"{package}[bench]"
        return
    parsed = Requirement(wanted)
    assert (parsed.name, parsed.extras, parsed.url) == ("tlinformer-jax", extras, url)


@pytest.mark.slow
@pytest.mark.long
def test_every_cell_runs(tmp_path, monkeypatch):
    need_modules("nbclient", "ipykernel", "matplotlib", extra="notebook")
    monkeypatch.setenv("TLINFORMER_NOTEBOOK", json.dumps(FEW))
    monkeypatch.setenv("XLA_FLAGS", quick_flags())
    startup = tmp_path / "ipython" / "profile_default" / "startup"  # a fourth of the text that it trains on
    startup.mkdir(parents=True)
    (startup / "few.py").write_text("import pydoc_data.topics as p; p.topics = dict(list(p.topics.items())[::4])\n")
    notebook = execute(tmp_path)
    check_outputs(notebook, FEW["STEPS"], FEW["NEW_TOKENS"])
    assert (tmp_path / "runs" / "notebook" / "metrics.jsonl").exists()


def execute(folder: pathlib.Path) -> dict:
    """The notebook, with the outputs of a run in a folder; raises where a cell does."""
    import nbclient
    import nbformat

    environment = {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", f"{ROOT}/.jax_cache"),
        "IPYTHONDIR": str(folder / "ipython"),
    }
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # Messages in several pieces become one output.
    options = {"timeout": 1200, "kernel_name": "python3", "record_timing": False, "coalesce_streams": True}
    client = nbclient.NotebookClient(notebook, **options, resources={"metadata": {"path": str(folder)}})
    client.execute(env=os.environ | environment)
    return notebook


def make() -> None:
    """Executes the notebook as it is and stores it; paths then start in the folder that it ran in."""
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(execute(pathlib.Path(folder)), indent=1, ensure_ascii=False)
        NOTEBOOK.write_text(text.replace(f"{folder}/", "") + "\n")


if __name__ == "__main__":
    make()

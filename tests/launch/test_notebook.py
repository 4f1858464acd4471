"""The notebook of launch/, executed from top to bottom on the CPU with a small model."""

import base64
import json
import os

import pytest

from tests.support.commands import ROOT
from tests.support.compilation import quick_flags
from tests.support.optional import need_modules

NOTEBOOK = ROOT / "launch" / "colab_tpu.ipynb"
SMALL = (
    *("--config.model.d_model=16", "--config.model.num_heads=2", "--config.model.num_blocks=1"),
    *("--config.data.sequence_length=64", "--config.train.batch_size=8"),
    *("--config.train.warmup_steps=2", "--config.train.eval_every=20"),
)


def outputs(notebook, kind: str) -> list[str]:
    """What the cells show of a MIME type, or on stdout."""
    found = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    if kind == "stdout":
        return [output.text for output in found if output.output_type == "stream" and output.name == "stdout"]
    return [output.data[kind] for output in found if kind in output.get("data", {})]


@pytest.mark.slow
def test_every_cell_runs_and_shows_its_figures_and_texts(tmp_path, monkeypatch):
    need_modules("nbclient", "ipykernel", "matplotlib", extra="notebook")
    import nbclient
    import nbformat

    workdir = tmp_path / "run"
    values = {"WORKDIR": str(workdir), "STEPS": 40, "EXTRA_FLAGS": " ".join(SMALL)}
    values |= {"PROMPT_LENGTHS": "40,80", "NEW_TOKENS": 20}
    monkeypatch.setenv("TLINFORMER_NOTEBOOK", json.dumps(values))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", quick_flags())
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ.get("JAX_COMPILATION_CACHE_DIR", f"{ROOT}/.jax_cache"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    client.execute()  # raises where a cell does
    text = "".join(outputs(notebook, "stdout"))
    assert f"checkout: {ROOT}" in text
    assert "step 40/40" in text
    assert text.count("nats per byte at step 40") == 2, "of training, and of what is held out"
    assert "bits per byte" in text
    assert "--- The for statement " in text
    assert "miss: slide" in text
    figures = [base64.b64decode(picture) for picture in outputs(notebook, "image/png")]
    assert len(figures) == 2
    for number, picture in enumerate(figures):
        assert picture.startswith(b"\x89PNG")
        (tmp_path / f"figure{number}.png").write_bytes(picture)
    assert not any(output.output_type == "error" for cell in notebook.cells for output in cell.get("outputs", []))


def test_it_is_kept_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    assert "tensorflow" not in NOTEBOOK.read_text().lower()

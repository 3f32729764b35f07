"""experiments/colab.ipynb: clean in git, names what exists, runs from top to bottom."""

import ast
import json
import os
import re
from pathlib import Path

import pytest

from configs import base
from omniopd_jax.train.metrics import meaning

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "experiments" / "colab.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def _code(notebook) -> str:
    return "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")


def test_it_is_a_notebook_without_outputs(notebook):
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(notebook)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    assert "execution" not in json.dumps([cell["metadata"] for cell in notebook["cells"]])


def test_every_setting_and_metric_that_it_names_exists(notebook):
    code = _code(notebook)
    knobs = base.get_config().to_dict()
    named = re.findall(r"\b(?:settings|mine|config)\.(\w+)\.(\w+)", code)
    assert len(named) > 8
    for section, knob in named:
        assert knob == "update" or knob in knobs[section], f"{section}.{knob}"
    for section, changes in re.findall(r"settings\.(\w+)\.update\(([^)]*)\)", code):
        for knob in re.findall(r"(\w+)=", changes):
            assert knob in knobs[section], f"{section}.{knob}"
    for name in re.findall(r'"(\w+/\w+)"', code):
        if name.partition("/")[0] in ("eval", "audit", "rollout", "loss", "teacher", "time"):
            assert meaning(name) is not None, name


def test_it_is_python(notebook):
    code = re.sub(r"^(\s*)[%!].*$", r"\1pass", _code(notebook), flags=re.M)
    ast.parse(code)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    """In a checkout's copy, so that nothing is left behind; with the short parameters."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    for name in ("configs", "experiments", "omniopd_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("OMNIOPD_NOTEBOOK_FAST", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    # tqdm, which transformers brings, misses ipywidgets in a bare kernel; Colab has them.
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    book = nbformat.reads(json.dumps(notebook), as_version=4)
    client = nbclient.NotebookClient(
        book, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    shown = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in shown), "a plot"
    text = "\n".join(output.get("text", "") for output in shown)
    assert "updates  4" in text
    assert "The teacher:" in text
    assert "about $" in text  # the projected cost
    assert any("rgba(213,94,0" in output.get("data", {}).get("text/html", "") for output in shown), "one audit"
    assert not [output for output in shown if output.get("name") == "stderr"], "nothing on the standard error"
    assert (tmp_path / "runs" / "notebook" / "run" / "report.html").is_file()

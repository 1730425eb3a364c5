"""The notebooks: kept with their outputs, as readers on the web see them, and run whole."""

import ast
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_four_notebooks():
    assert [notebook.stem[:2] for notebook in NOTEBOOKS] == ["01", "02", "03", "04"]


@each_notebook
def test_code_of_notebook_was_run_in_order_and_ends_with_a_picture(notebook):
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        ast.parse("".join(cell["source"]))
        assert cell["execution_count"] == number
    assert any("image/jpeg" in output.get("data", {}) for output in cells[-1]["outputs"])


@each_notebook
def test_outputs_are_of_real_weights_and_name_no_place_of_a_machine(notebook):
    outputs = [output for cell in json.loads(notebook.read_text())["cells"] for output in cell.get("outputs", [])]
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    text = "".join("".join(output.get("text") or output["data"].get("text/plain", "")) for output in outputs)
    assert "RANDOM TEACHER" not in text
    assert not re.search(r"site-packages|(?<![\w.])(?:/\w[\w.-]*){2,}|[A-Z]:\\\\", text)


def test_notebooks_are_small():
    assert sum(notebook.stat().st_size for notebook in NOTEBOOKS) < 1_500_000


@pytest.mark.slow
@each_notebook
def test_notebook_runs_quickly(notebook, tmp_path, monkeypatch):
    if find_spec("nbclient") is None or find_spec("ipykernel") is None:
        pytest.skip("nbclient or ipykernel is not installed: make notebooks installs them")
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("QUICK", "1")
    ran = NotebookClient(
        nbformat.read(notebook, as_version=4),
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": tmp_path}},
    ).execute()
    assert any("image/jpeg" in output.get("data", {}) for output in ran.cells[-1]["outputs"])

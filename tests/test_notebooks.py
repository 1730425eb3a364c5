"""The notebooks: kept without outputs, and run whole."""

import ast
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_four_notebooks():
    assert [notebook.stem[:2] for notebook in NOTEBOOKS] == ["01", "02", "03", "04"]


@each_notebook
def test_notebook_is_stripped_and_its_code_compiles(notebook):
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        assert not cell["outputs"]
        assert cell["execution_count"] is None
        ast.parse("".join(cell["source"]))
    assert "plt." in "".join(cells[-1]["source"])  # ends with a picture


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
    assert any("image/png" in output.get("data", {}) for output in ran.cells[-1]["outputs"])

"""Every notebook runs from its first cell to its last, offline, in a kernel of its own."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_executes(tmp_path, monkeypatch, notebook):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    found = nbformat.read(notebook, as_version=4)
    assert not any(cell.get("outputs") for cell in found.cells), "outputs are of one machine; leave them out"
    NotebookClient(found, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert any(cell.get("outputs") for cell in found.cells)


def test_there_is_a_notebook():
    assert [notebook.stem for notebook in NOTEBOOKS][:1] == ["01_setup_environment"]

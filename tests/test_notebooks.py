"""The notebooks run from top to bottom, their cells one after another in one namespace, in an empty folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recordings import ROOT

NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
every_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def cells(notebook: Path) -> list[dict[str, Any]]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


@every_notebook
def test_nothing_that_was_run_is_kept(notebook: Path) -> None:
    assert {cell["cell_type"] for cell in cells(notebook)} == {"markdown", "code"}
    assert all(cell["outputs"] == [] for cell in cells(notebook) if cell["cell_type"] == "code")
    assert len({cell["id"] for cell in cells(notebook)}) == len(cells(notebook))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@every_notebook
def test_it_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells(notebook):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{notebook.name}, {cell['id']}", "exec"), names)
    assert np.isfinite(names["nll"].mean().item())
    assert len(names["waveform"]) == 6000

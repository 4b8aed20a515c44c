"""The lab from Python, as the example shows it."""

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[3] / "examples" / "lab.py"


def test_the_notebook_runs(capsys):
    cells = runpy.run_path(str(EXAMPLE))
    assert list(cells["comparison"].labels)[3] == "ring, parts 2, split 10, heal 30"
    assert cells["run"].frame["seed"].nunique() == 3
    assert cells["curves"]["accuracy"].iloc[-1] > 0.5
    assert "comparison.png" in capsys.readouterr().out


def test_cells_are_marked():
    text = EXAMPLE.read_text()
    assert text.count("# %%\n") == text.count("# %% [markdown]\n") + 1 > 4

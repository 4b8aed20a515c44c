"""The convergence lab from Python: a notebook for VS Code, PyCharm or Jupyter with jupytext, and a script."""

# %%
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

import p2pfl
from p2pfl.simulation.compare import compare, save_comparison

# %% [markdown]
# A scenario is what a file says, as arguments. What is left out has its default; `p2pfl scenario explain` lists all.

# %%
scenario = p2pfl.Scenario(
    name="lab",
    peers=16,
    seeds=(0, 1, 2),
    data={"task": "digits", "partition": "classes", "classes": 2},
    training={"rounds": 40, "local_steps": 2, "batch_size": 16, "learning_rate": 0.3},
    averaging={"topology": "ring"},
    evaluation={"times": 9, "peers": 16},
)
run = p2pfl.simulate(scenario)

# %% [markdown]
# A run has its curves as a pandas frame, a row for each seed and round, and what it came to.

# %%
curves = run.evaluated.groupby("round")[["accuracy", "peer_accuracy", "consensus"]].median()
print(curves)
print("mean model:", run.summary["final"]["accuracy"])

# %% [markdown]
# Peers that see two classes each: how different are they at the end?

# %%
last = run.peers[run.peers["round"] == run.peers["round"].max()]
print(last.groupby("seed")["accuracy"].describe()[["min", "50%", "max"]])

# %% [markdown]
# The same on other graphs, and on a network that is split between rounds 10 and 30.

# %%
changes = [
    {"averaging": {"topology": "exponential"}},
    {"averaging": {"topology": "groups"}},
    {"faults": {"parts": 2, "split": 10, "heal": 30}},
]
runs = [run, *(p2pfl.simulate(p2pfl.Scenario(**{**scenario.settings(), **change})) for change in changes)]
comparison = compare(runs)
with pd.option_context("display.max_columns", None, "display.width", 120):
    print(comparison.table)

# %% [markdown]
# Figures as for a paper; give `simulate` a folder as its second argument to keep the runs themselves.

# %%
with TemporaryDirectory() as folder:
    for file in save_comparison(comparison, Path(folder)):
        print(file.name, file.stat().st_size, "bytes")

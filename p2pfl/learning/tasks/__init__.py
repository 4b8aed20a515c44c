"""The tasks that ship with the package, by name; each is one file, loaded as a user's own file would be.

Owns the names. Must not import the tasks: torch takes seconds to load.
"""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent

BUILT_IN: dict[str, str] = {
    "digits": "digits.py:Digits",
    "breast-cancer": "breast_cancer.py:BreastCancer",
    "quadratics": "quadratics.py:Quadratics",
    "synthetic": "synthetic.py:Synthetic",
    "tabular": "tabular.py:Tabular",
    "credit": "credit.py:Credit",
    "cifar10": "images.py:Cifar10",
    "mnist": "images.py:Mnist",
}
"""Name -> `file:class`, the file relative to `FOLDER`."""

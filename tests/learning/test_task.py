import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from p2pfl.core.errors import InvalidConfig, RoundFailed
from p2pfl.learning.task import Examples, Task, blame, load_task, make_model, read_data

MINIMAL = """
import torch
from p2pfl import Data, Examples, Task

class Mine(Task):
    def model(self):
        return torch.nn.Linear(3, 2)

    def data(self, settings):
        examples = Examples(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
        return Data(examples, examples)
"""


def write(folder: Path, code: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(code)
    return path


def refusal(source: str, base: Path, sha256: str | None = None) -> str:
    with pytest.raises(InvalidConfig) as caught:
        load_task(source, base, sha256)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_users_file_loads_with_its_hash(tmp_path):
    path = write(tmp_path, MINIMAL)
    loaded = load_task("mine.py:Mine", tmp_path)
    assert loaded.path == path
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(read_data(loaded.task, {}).train) == 4
    assert load_task("mine.py:Mine", tmp_path, loaded.sha256.upper()).sha256 == loaded.sha256
    assert type(loaded.task).__module__.startswith("_p2pfl_task_")


@pytest.mark.parametrize("name", ["digits", "breast-cancer"])
def test_built_in_tasks_load_by_name(name, tmp_path):
    loaded = load_task(name, tmp_path)
    data = read_data(loaded.task, {})
    outputs = make_model(loaded.task)(data.test.inputs)
    assert outputs.shape == (len(data.test), len(loaded.task.classes))
    assert set(data.test.targets.tolist()) == set(range(len(loaded.task.classes)))
    assert loaded.sha256 == hashlib.sha256(loaded.path.read_bytes()).hexdigest()


def test_another_hash_is_refused_before_the_file_runs(tmp_path):
    write(tmp_path, f"from pathlib import Path\nPath({str(tmp_path)!r}, 'ran').touch()\n" + MINIMAL)
    message = refusal("mine.py:Mine", tmp_path, "cd34" * 16)
    assert "mine.py has SHA-256" in message
    assert "the charter says cd34" in message
    assert "sign a new charter" in message
    assert not (tmp_path / "ran").exists()
    assert "version of p2pfl" in refusal("digits", tmp_path, "0" * 64)


def test_cached_bytecode_is_never_what_runs(tmp_path):
    """An import would trust a .pyc that carries the source's time and size: the hash would then be of another code."""
    import importlib.util
    import py_compile

    path = write(tmp_path, MINIMAL.replace("torch.nn.Linear(3, 2)", "torch.nn.Linear(3, 9)"))
    cached = importlib.util.cache_from_source(str(path))
    py_compile.compile(str(path), cached, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    write(tmp_path, MINIMAL)
    assert make_model(load_task("mine.py:Mine", tmp_path).task).out_features == 2


def test_a_changed_file_is_loaded_anew(tmp_path):
    write(tmp_path, MINIMAL)
    first = load_task("mine.py:Mine", tmp_path)
    write(tmp_path, MINIMAL.replace("(3, 2)", "(3, 5)"))
    second = load_task("mine.py:Mine", tmp_path)
    assert first.sha256 != second.sha256
    assert make_model(first.task).out_features == 2
    assert make_model(second.task).out_features == 5


def test_what_is_unknown_is_named(tmp_path):
    write(tmp_path, MINIMAL + "\nNumber = 3\n")
    message = refusal("digit", tmp_path)
    assert "'digit'" in message
    assert "breast-cancer, cifar10, credit, digits" in message
    assert "no file" in refusal("none.py:Mine", tmp_path)
    assert "no class 'Other'; its tasks are: Mine" in refusal("mine.py:Other", tmp_path)
    assert "Number is not a Task" in refusal("mine.py:Number", tmp_path)
    assert "unknown task" in refusal("mine.py:", tmp_path)
    (tmp_path / "folder.py").mkdir()
    assert "cannot read" in refusal("folder.py:Mine", tmp_path)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x = 1\n\ny = x / 0\n", "mine.py:3: ZeroDivisionError: division by zero; correct the file"),
        ("x = 1\ndef f(:\n", "mine.py:2: SyntaxError"),
        ("import nothing_of_this_name\n", "a task is one file"),
        ("import sys\nsys.exit(3)\n", "mine.py:2: SystemExit"),
        ("raise ValueError('one\\ntwo' + 'x' * 5000)\n", "mine.py:1: ValueError: one two"),
        (MINIMAL.replace("def data", "def date"), "making a Mine raised TypeError"),
        (
            MINIMAL + "\n    def __init__(self):\n        self.x = [][1]\n",
            "mine.py:14: making a Mine raised IndexError",
        ),
        (MINIMAL + "\n    def __new__(cls):\n        return 3\n", "is not a Task"),
    ],
)
def test_a_file_that_fails_is_one_line_that_says_where(code, expected, tmp_path):
    write(tmp_path, code)
    message = refusal("mine.py:Mine", tmp_path)
    assert expected in message
    assert len(message) < 600


def test_a_file_that_fails_leaves_no_module(tmp_path):
    write(tmp_path, "x = 1 / 0")
    before = set(sys.modules)
    refusal("mine.py:Mine", tmp_path)
    assert set(sys.modules) == before


def test_what_a_method_raises_names_the_method_and_the_line(tmp_path):
    write(tmp_path, MINIMAL.replace("        examples =", "        settings['path']\n        examples ="))
    task = load_task("mine.py:Mine", tmp_path).task
    with pytest.raises(InvalidConfig, match=r"^mine\.py:10: Mine\.data raised KeyError: 'path'; correct") as caught:
        read_data(task, {})
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_relative_folder_names_the_line_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, MINIMAL.replace("        examples =", "        1 / 0\n        examples ="))
    with pytest.raises(InvalidConfig, match=r"^mine\.py:10: "):
        read_data(load_task("mine.py:Mine", Path()).task, {})
    write(tmp_path, "1 / 0")
    assert refusal("mine.py:Mine", Path()).startswith("mine.py:1: ")


def test_blame_passes_our_own_errors_and_interrupts():
    task = load_task("digits", Path()).task
    with pytest.raises(RoundFailed, match=r"^mine$"), blame(task, "data"):
        raise RoundFailed("mine")
    with pytest.raises(KeyboardInterrupt), blame(task, "data"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("return 3", "returned int"),
        ("e = Examples(torch.zeros(0, 3), torch.zeros(0)); return Data(e, e)", "no train examples"),
        ("e = Examples(torch.full((2, 3), float('nan')), torch.zeros(2)); return Data(e, e)", "nan or inf"),
        ("e = Examples(torch.zeros(4, 3), torch.zeros(3))", "mine.py:10: Mine.data raised ValueError: inputs of shape"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(line, expected, tmp_path):
    write(tmp_path, MINIMAL.replace("        examples =", f"        {line}\n        examples ="))
    with pytest.raises(InvalidConfig) as caught:
        read_data(load_task("mine.py:Mine", tmp_path).task, {})
    assert expected in str(caught.value)


def test_a_model_must_be_a_module(tmp_path):
    write(tmp_path, MINIMAL.replace("torch.nn.Linear(3, 2)", "'linear'"))
    with pytest.raises(InvalidConfig, match=r"Mine\.model returned str"):
        make_model(load_task("mine.py:Mine", tmp_path).task)


def test_examples_have_one_target_each():
    assert len(Examples(torch.zeros(3, 2), torch.zeros(3))) == 3
    with pytest.raises(ValueError, match="one target for each input"):
        Examples(torch.zeros(3, 2), torch.zeros(2))


def test_defaults_of_the_contract():
    task: Task = load_task("digits", Path()).task
    outputs = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 1.0]])
    targets = torch.tensor([0, 1, 1, 1])
    assert task.metrics(outputs, targets) == {"accuracy": 0.75}
    expected = -torch.log_softmax(outputs, 1)[torch.arange(4), targets].mean()
    assert torch.isclose(task.loss(outputs, targets), expected)


def test_the_example_trains(tmp_path):
    from p2pfl.learning.trainer import Trainer
    from p2pfl.learning.vector import initial, notes

    source = Path(__file__).parents[2] / "examples" / "own_task.py"
    assert len(source.read_text().splitlines()) < 40
    task = load_task("own_task.py:SmallCnn", source.parent).task
    parts = [read_data(task, {"peers": 3, "index": i}) for i in range(3)]
    assert sum(len(p.train) for p in parts) + len(parts[0].test) == 1797
    trainer = Trainer(task, parts[0], local_steps=20, batch_size=32, clip_norm=0.0, seed=0)
    start = initial(task, 0)
    assert trainer.evaluate(trainer.train(start, 0).vector)["loss"] < trainer.evaluate(start)["loss"]
    assert notes(trainer.model) == []
    np.savetxt(tmp_path / "images.csv", np.zeros((2, 64)), delimiter=",")
    assert trainer.model(task.read_inputs(tmp_path / "images.csv")).shape == (2, 10)


def test_the_example_on_text_trains(tmp_path):
    from p2pfl.learning.trainer import Trainer
    from p2pfl.learning.vector import initial, notes

    task = load_task("next_character.py:NextCharacter", Path(__file__).parents[2] / "examples").task
    parts = [read_data(task, {"peers": 3, "index": i}) for i in range(3)]
    whole = read_data(task, {})
    assert torch.equal(torch.cat([part.train.inputs for part in parts]), whole.train.inputs)
    assert torch.equal(whole.train.inputs[1, -1:], whole.train.targets[:1])
    trainer = Trainer(task, whole, local_steps=200, batch_size=32, clip_norm=0.0, seed=0)
    start = initial(task, 0)
    spaces = float((whole.test.targets == 0).float().mean())
    assert trainer.evaluate(trainer.train(start, 0).vector)["accuracy"] > spaces + 0.05
    assert notes(trainer.model) == []

    (tmp_path / "own.txt").write_text("Ünd so weiter, und so fort. " * 10)
    own = read_data(task, {"path": str(tmp_path / "own.txt")})
    assert len(own.train) > 100
    assert len(task.read_inputs(tmp_path / "own.txt")) > len(own.train) + len(own.test)
    (tmp_path / "own.txt").write_text("too short")
    with pytest.raises(InvalidConfig, match="a text of 9 characters"):
        read_data(task, {"path": str(tmp_path / "own.txt")})
    (tmp_path / "own.txt").write_bytes(b"\xff" * 200)
    with pytest.raises(InvalidConfig, match="UnicodeDecodeError"):
        read_data(task, {"path": str(tmp_path / "own.txt")})


def test_the_package_and_the_names_load_without_torch():
    code = "import sys, p2pfl.learning, p2pfl.learning.tasks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

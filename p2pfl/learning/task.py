"""The contract a user implements to bring a model and data, and how a file that implements it is loaded.

Owns `Task`, the values it returns, and the one line a user reads when their file is at fault. Must not train: that is
`trainer`'s work. The file that is hashed is the file that is executed: it is read once, and no cached bytecode is used.
"""

import hashlib
import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

import torch
from torch import Tensor, nn

from p2pfl.core.charter import TableTerms
from p2pfl.core.errors import InvalidConfig, P2pflError
from p2pfl.learning.tables import read_table
from p2pfl.learning.tasks import BUILT_IN, FOLDER

LONGEST_REASON = 300
"""Characters of a foreign error that a message quotes: a guess at what still reads as one line."""


@dataclass(frozen=True)
class Examples:
    """Inputs and what they should give: `inputs` is [n, ...], `targets` is [n] (class numbers are int64).

    Raises:
        ValueError: unless there is one target for each input.
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if self.inputs.ndim < 1 or self.targets.ndim < 1 or len(self.inputs) != len(self.targets):
            raise ValueError(
                f"inputs of shape {list(self.inputs.shape)} and targets of shape {list(self.targets.shape)}: "
                "give one target for each input"
            )

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.targets)


@dataclass(frozen=True)
class Data:
    """What one peer has: `train`, its own; `test`, what nobody trains on (the same for all peers in built-in tasks)."""

    train: Examples
    test: Examples


class Task(ABC):
    """What a peer trains. Subclass it in one file that imports nothing beside it: all peers must hold the same bytes.

    Every peer makes the same model from the same code, so `model` must not depend on the peer's data.
    """

    classes: tuple[str, ...] = ()
    """The names of classes 0, 1, ...; optional, for people to read."""

    def with_table(self, table: TableTerms) -> "Task":
        """Return the task for the table that the charter describes; none takes one unless this is overridden.

        Raises:
            InvalidConfig: the task takes no table.
        """
        del table
        raise InvalidConfig(f"{type(self).__name__} takes no table; remove task.table from the charter")

    @abstractmethod
    def model(self) -> nn.Module:
        """Make a new, untrained model: [n, ...] inputs to [n, classes] float32 outputs (logits), on the CPU."""

    @abstractmethod
    def data(self, settings: Mapping[str, object]) -> Data:
        """Read this peer's data; `settings` is the `[data]` table of its peer.toml."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Give what training lowers, a scalar: the mean cross entropy of [n, classes] logits, unless overridden."""
        return nn.functional.cross_entropy(outputs, targets)

    def measure(self, model: nn.Module, train: Examples) -> bool:
        """Put into the model's buffers what all must agree on before the first step; say whether anything was put.

        Asked before the local steps of each round, without gradients. A round in which something was put makes no
        step: the buffers travel in the round's sum, and from the next round on the model has the federation's. Nothing
        is agreed on unless overridden.
        """
        del model, train
        return False

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Measure held-out outputs, by name: the fraction classified correctly, unless overridden."""
        return {"accuracy": float((outputs.argmax(1) == targets).float().mean())}

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Make the optimiser of the local steps: SGD at 0.1 (a guess), unless overridden."""
        return torch.optim.SGD(parameters, lr=0.1)

    def read_inputs(self, path: Path) -> Tensor:
        """Read inputs to classify: the columns of a CSV or Parquet file, or a .npy array, as float32 [n, ...].

        Raises:
            InvalidConfig: if the file cannot be read, or does not hold finite numbers only.
        """
        return torch.from_numpy(read_table(path))


@dataclass(frozen=True)
class LoadedTask:
    """A task and the file it came from: `sha256` is over the file's bytes, in lower-case hexadecimal."""

    task: Task
    path: Path
    sha256: str


def load_task(source: str, base: Path, sha256: str | None = None, table: TableTerms | None = None) -> LoadedTask:
    """Load a task by its built-in name, or as `file.py:ClassName` with the file relative to `base`.

    With `sha256` (hexadecimal, any case), a file that differs is not executed. With `table`, the task is for that.

    Raises:
        InvalidConfig: if there is no such task, its file has another hash or fails, its class is not a `Task`, or the
            task takes no table.
    """
    path, class_name = _locate(source, base)
    code = _read(path, source)
    found = hashlib.sha256(code).hexdigest()
    if sha256 is not None and found != sha256.lower():
        raise InvalidConfig(
            f"{path.name} has SHA-256 {found[:12]}…, the charter says {sha256.lower()[:12]}…; "
            + ("install the version of p2pfl that the charter was made with" if source in BUILT_IN else
               "ask whoever wrote the charter for the file, or sign a new charter")
        )  # fmt: skip
    module = _execute(path, code, found)
    task = _instantiate(module, path, class_name)
    if table is not None:
        with blame(task, "with_table"):
            task = task.with_table(table)
    return LoadedTask(task, path, found)


def read_data(task: Task, settings: Mapping[str, object]) -> Data:
    """Have the task read this peer's data, and check what training takes for granted.

    Raises:
        InvalidConfig: if the task fails, or its data is empty or not finite.
    """
    with blame(task, "data"):
        data = task.data(settings)
    name = f"{type(task).__name__}.data"
    if not isinstance(data, Data):
        raise InvalidConfig(f"{name} returned {type(data).__name__}; return Data(train=Examples(...), test=...)")
    for part, examples in (("train", data.train), ("test", data.test)):
        if len(examples) == 0:
            raise InvalidConfig(f"{name} returned no {part} examples; check the paths and the shares in [data]")
        if examples.inputs.is_floating_point() and not bool(torch.isfinite(examples.inputs).all()):
            raise InvalidConfig(f"{name} returned {part} inputs with nan or inf; fill or drop missing values")
    return data


def make_model(task: Task) -> nn.Module:
    """Make the task's model.

    Raises:
        InvalidConfig: if the task fails, or returns anything else.
    """
    with blame(task, "model"):
        model = task.model()
    if not isinstance(model, nn.Module):
        raise InvalidConfig(f"{type(task).__name__}.model returned {type(model).__name__}; return a torch.nn.Module")
    return model


@contextmanager
def blame(
    task: Task, method: str, failure: Callable[[str], P2pflError] = InvalidConfig, context: str = ""
) -> Iterator[None]:
    """Turn what a task's method raises into one line that says which method of which class, and where in its file.

    Errors that are already ours pass unchanged.

    Raises:
        P2pflError: as `failure` makes it from the line; `context` goes before the line.
    """
    try:
        yield
    except P2pflError:
        raise
    except (Exception, SystemExit) as error:
        place = _place(Path(getattr(sys.modules.get(type(task).__module__), "__file__", None) or "?"), error)
        raise failure(
            f"{context}{place}: {type(task).__name__}.{method} raised {_reason(error)}; correct the task or its data"
        ) from error


class _ReadOnce(SourceFileLoader):
    """Executes the bytes that were hashed, never the file as it is now nor bytecode cached beside it."""

    def __init__(self, name: str, path: str, code: bytes) -> None:
        super().__init__(name, path)
        self._code = code

    def get_code(self, fullname: str) -> CodeType:
        """Compile the bytes that were hashed."""
        return compile(self._code, self.get_filename(fullname), "exec", dont_inherit=True)


def _locate(source: str, base: Path) -> tuple[Path, str]:
    if source in BUILT_IN:
        file, _, class_name = BUILT_IN[source].rpartition(":")
        return FOLDER / file, class_name
    file, _, class_name = source.rpartition(":")
    if not file.endswith(".py") or not class_name.isidentifier():
        known = ", ".join(sorted(BUILT_IN))
        raise InvalidConfig(f"unknown task {source!r}; use one of {known}, or your own as file.py:ClassName")
    return (base / file).absolute(), class_name  # tracebacks name the file as it was given


def _read(path: Path, source: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InvalidConfig(f"task {source!r}: there is no file {path}; put it there or correct the path") from error
    except OSError as error:
        raise InvalidConfig(f"task {source!r}: cannot read {path}: {error.strerror}; check its permissions") from error


def _execute(path: Path, code: bytes, sha256: str) -> ModuleType:
    # Private, and unique to the place and the content, so that no file of a user's shadows a module of anyone's.
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    name = f"_p2pfl_task_{sha256[:16]}_{place[:16]}"
    loader = _ReadOnce(name, str(path), code)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    if spec is None:  # only without a loader, which it has
        raise InvalidConfig(f"cannot load {path}; is it a Python file?")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while the file executes
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        raise InvalidConfig(f"{_place(path, error)}: {_reason(error)}; {_advice(error)}") from error
    return module


def _instantiate(module: ModuleType, path: Path, class_name: str) -> Task:
    kind = getattr(module, class_name, None)
    if kind is None:
        tasks = [n for n, v in vars(module).items() if _is_task(v) and v.__module__ == module.__name__]
        raise InvalidConfig(f"{path.name} has no class {class_name!r}; its tasks are: {', '.join(tasks) or 'none'}")
    if not _is_task(kind):
        raise InvalidConfig(f"{path.name}: {class_name} is not a Task; write `class {class_name}(p2pfl.Task):`")
    try:
        task = kind()
    except (Exception, SystemExit) as error:
        raise InvalidConfig(
            f"{_place(path, error)}: making a {class_name} raised {_reason(error)}; "
            "a task needs all abstract methods, and no arguments"
        ) from error
    if not isinstance(task, Task):
        raise InvalidConfig(f"{path.name}: {class_name}() is not a Task; remove its __new__")
    return task


def _is_task(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Task)


def _place(path: Path, error: BaseException) -> str:
    """`file:line` of the innermost frame in that file, or the file alone."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == str(path):
            line = step.tb_lineno
        step = step.tb_next
    return path.name if line is None else f"{path.name}:{line}"


def _reason(error: BaseException) -> str:
    text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    text = text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 1] + "…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _advice(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        return "a task is one file: install the module, or move its code into the file"
    return "correct the file"

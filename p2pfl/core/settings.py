"""How files of settings are read: strictly, and with errors a person can act on.

Unknown keys and wrong types are refused; each error is one line that names the file and the key.
"""

import tomllib
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from p2pfl.core.errors import InvalidConfig


class Settings(BaseModel):
    """A table of settings: frozen, complete, nothing unknown in it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Model = TypeVar("Model", bound=BaseModel)


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """Parse TOML.

    Raises:
        InvalidConfig: it is not TOML; the message has the line.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidConfig(f"{where}: not TOML: {error}") from error
    except RecursionError as error:
        raise InvalidConfig(f"{where}: nested too deeply; no settings of ours are") from error


def validate(kind: type[Model], values: object, where: str) -> Model:
    """Read `values` as settings of `kind`.

    Args:
        kind: the settings' class.
        values: tables as parsed from TOML.
        where: the file's name, for errors.

    Raises:
        InvalidConfig: the first thing wrong, as `file: key: what`, and how many more there are.
    """
    try:
        # TOML has no tuples: lists are taken for them, everything else stays strict.
        return kind.model_validate(values)
    except ValidationError as error:
        first, *more = error.errors(include_url=False)
        key = ".".join(str(part) for part in first["loc"])
        others = f" (and {len(more)} more)" if more else ""
        raise InvalidConfig(
            f"{where}: {_printable(f'{key}: ' if key else '')}{_printable(_explain(kind, first))}{others}"
        ) from error


def _printable(text: str) -> str:
    """Escape what would break the line or drive the terminal: the text may quote a file that somebody sent."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def _explain(kind: type[BaseModel], error: Any) -> str:
    given = repr(error.get("input"))
    given = given if len(given) <= 40 else given[:37] + "..."
    match error["type"]:
        case "extra_forbidden":
            known = ", ".join(_keys(kind, error["loc"][:-1])) or "none"
            return f"unknown setting; the known ones here are {known}"
        case "missing":
            return "missing; add it"
        case "value_error":
            return str(error["ctx"]["error"])
        case _:
            # TOML has no tuples, and a list is what is meant.
            return f"{_lower_first(error['msg'].replace('Tuple', 'List').replace('tuple', 'list'))}, got {given}"


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _keys(kind: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    current: type[BaseModel] = kind
    for part in path:
        if part not in current.model_fields:  # a place in a list, or a key of a dict
            continue
        annotation = current.model_fields[part].annotation
        inner = [annotation, *getattr(annotation, "__args__", ())]
        current = next((item for item in inner if isinstance(item, type) and issubclass(item, BaseModel)), current)
    return [field.alias or name for name, field in current.model_fields.items()]

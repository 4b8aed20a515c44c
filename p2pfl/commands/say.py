"""How commands read their common arguments, and how they answer people and programs."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

CharterFile = Annotated[Path, typer.Argument(help="The charter's file.")]
ConfigFile = Annotated[
    Path, typer.Option("--config", "-c", help="This member's peer.toml, or the folder it is in.", show_default=True)
]
HomeFolder = Annotated[Path, typer.Argument(metavar="[FOLDER]", help="This member's folder, or its peer.toml.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead: docs/operator.md has its keys.")]


def say(text: str) -> None:
    """Print a line for people; nothing in it is taken for markup."""
    Console(highlight=False, soft_wrap=True).print(text, markup=False)


def emit(values: dict[str, Any]) -> None:
    """Print one JSON object; what is no finite number becomes null."""
    typer.echo(json.dumps(_plain(values), indent=1, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

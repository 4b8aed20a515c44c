"""Draws docs/images/layers.svg: the layers, their modules, and what they import, from the code as it is.

    python docs/draw_layers.py            draw it
    python docs/draw_layers.py --check    exit 1 if the picture shows anything else than the code does

The layers and their order are those that import-linter enforces (pyproject.toml), the line under a layer's name is the
first of its docstring, and a number on an arrow counts imports of one module by another. What is drawn is also kept in
the picture as JSON, and that is what --check compares.
"""

import argparse
import ast
import json
import sys
import tomllib
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
# The code beside this file, whichever copy is installed.
sys.path.insert(0, str(ROOT))

import grimp  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "layers.svg"
PACKAGE = "p2pfl"

ROWS_RIGHT = 960
LEFT, TOP, GAP = 20, 70, 18
MODULES_LEFT = 300
BOX_HEIGHT, BOX_GAP, PADDING = 26, 8, 14
MONO = 7.25
"""Width of a character of the modules' names."""
LANE = 14
"""Distance of two vertical lines of arrows."""
PORT = 11
"""Distance of two ends of arrows on one row."""
COLORS = ("#555555", "#7a4fa3", "#b0413e", "#c0762b", "#8a8a1f", "#2f8f5b", "#2a86a8", "#4a5a78")
SANS = "font-family='Helvetica, Arial, sans-serif'"
CODE = "font-family='DejaVu Sans Mono, Menlo, Consolas, monospace'"


@dataclass(frozen=True)
class Layer:
    """A row: what it is for, and its modules; those of a package inside it by that package's name."""

    name: str
    purpose: str
    modules: dict[str, list[str]]


@dataclass(frozen=True)
class Content:
    """What the picture shows; `imports` are `importer, imported, how many`."""

    layers: list[Layer]
    imports: list[tuple[str, str, int]]

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def layer_names() -> list[str]:
    """Return the layers that import-linter enforces, the highest first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [name.removeprefix(f"{PACKAGE}.") for name in layers]


def purpose(layer: str) -> str:
    """Return the first line of a layer's docstring, up to the first colon or semicolon."""
    folder = ROOT / PACKAGE / layer
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = text.splitlines()[0] if text else ""
    for stop in ";:":
        first = first.split(stop)[0]
    return first.rstrip(".")


def read_content(graph: grimp.ImportGraph) -> Content:
    """Sort the modules of `graph` into layers, and count the imports from one layer to another."""
    names = layer_names()
    modules: dict[str, dict[str, list[str]]] = {name: {} for name in names}
    imports: Counter[tuple[str, str]] = Counter()
    for module in sorted(graph.modules):
        layer = _layer(module)
        if layer not in modules:
            continue
        _, _, *inside = module.split(".")
        is_package = any(other.startswith(f"{module}.") for other in graph.modules)
        if not is_package:
            modules[layer].setdefault("/".join(inside[:-1]), []).append(inside[-1] if inside else layer)
        for imported in graph.find_modules_directly_imported_by(module):
            if _layer(imported) in modules and _layer(imported) != layer:
                imports[layer, _layer(imported)] += 1
    layers = [Layer(name, purpose(name), dict(sorted(modules[name].items()))) for name in names]
    return Content(layers, [(a, b, imports[a, b]) for a in names for b in names if imports[a, b]])


def _layer(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


class Drawing:
    """The picture, from the top down."""

    def __init__(self, content: Content) -> None:
        self._content = content
        self._color = dict(zip([layer.name for layer in content.layers], COLORS, strict=False))
        self._rows: dict[str, tuple[float, float]] = {}
        self._parts: list[str] = []

    def draw(self) -> str:
        y = float(TOP)
        for layer in self._content.layers:
            y = self._row(layer, y) + GAP
        self._arrows()
        width, height = _lane(len(self._content.imports)) + 6, round(y + 6)
        size = f"viewBox='0 0 {width} {height}' width='{width}' height='{height}'"
        return "\n".join(
            [
                f"<svg xmlns='http://www.w3.org/2000/svg' {size}>",
                "<title>The layers of p2pfl and the imports between them</title>",
                f"<metadata>{escape(self._content.to_json())}</metadata>",
                f"<rect width='{width}' height='{height}' fill='#ffffff'/>",
                *self._heading(),
                *self._parts,
                "</svg>\n",
            ]
        )

    def _heading(self) -> list[str]:
        return [
            _text(LEFT, 34, "The layers, and what they import", 20, "#222222", "bold"),
            _text(
                LEFT, 55, "An arrow runs from the importing layer to the imported one; its number counts imports.", 13
            ),
        ]

    def _row(self, layer: Layer, y: float) -> float:
        """Draw a layer at `y`; return where it ends."""
        boxes, bottom = self._boxes(layer, y + PADDING)
        ends = [pair for pair in self._content.imports if layer.name in pair[:2]]
        lines = _wrapped(layer.purpose, 34)
        height = max(bottom + PADDING - y, 44 + 16 * len(lines), PORT * (len(ends) + 1))
        color = self._color[layer.name]
        self._rows[layer.name] = (y, height)
        self._parts += [
            f"<rect x='{LEFT}' y='{y:g}' width='{ROWS_RIGHT - LEFT}' height='{height:g}' rx='8' fill='{color}' "
            f"fill-opacity='0.09' stroke='{color}' stroke-width='1.4'/>",
            _text(LEFT + 16, y + 28, layer.name, 18, color, "bold"),
            *(_text(LEFT + 16, y + 48 + 16 * number, line, 12) for number, line in enumerate(lines)),
            *boxes,
        ]
        return y + height

    def _boxes(self, layer: Layer, y: float) -> tuple[list[str], float]:
        parts: list[str] = []
        color = self._color[layer.name]
        for package, names in layer.modules.items():
            x = float(MODULES_LEFT)
            if package:
                label = f"{package}/"
                parts.append(_text(x, y + 18, label, 12, color, "bold", CODE))
                x += len(label) * MONO + 10
            start = x
            for name in names:
                width = len(name) * MONO + 18
                if x + width > ROWS_RIGHT - 16:
                    x, y = start, y + BOX_HEIGHT + BOX_GAP
                parts += [
                    f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{BOX_HEIGHT}' rx='4' fill='#ffffff' "
                    f"stroke='{color}' stroke-opacity='0.55'/>",
                    _text(x + width / 2, y + 17.5, name, 12, "#222222", family=CODE, anchor="middle"),
                ]
                x += width + BOX_GAP
            y += BOX_HEIGHT + BOX_GAP
        return parts, y - BOX_GAP

    def _arrows(self) -> None:
        """Draw a line down for each pair of layers: the shorter, the nearer to the rows, so that few cross."""
        order = [layer.name for layer in self._content.layers]
        pairs = sorted(self._content.imports, key=lambda pair: (order.index(pair[1]) - order.index(pair[0]), pair[0]))
        lanes = {pair[:2]: number for number, pair in enumerate(pairs)}
        for upper, lower, count in pairs:
            color, x = self._color[upper], _lane(lanes[upper, lower])
            start, end = self._port(upper, (upper, lower), lanes), self._port(lower, (upper, lower), lanes)
            self._parts += [
                f"<path d='M {ROWS_RIGHT} {start:g} H {x - 5} Q {x} {start:g} {x} {start + 5:g} V {end - 5:g} "
                f"Q {x} {end:g} {x - 5} {end:g} H {ROWS_RIGHT + 8}' fill='none' stroke='{color}' stroke-width='1.5'/>",
                f"<path d='M {ROWS_RIGHT + 1} {end:g} l 9 -4 v 8 z' fill='{color}'/>",
                f"<rect x='{ROWS_RIGHT + 12}' y='{end - 5.5:g}' width='{6.5 * len(str(count)) + 3:g}' height='11' "
                "fill='#ffffff'/>",
                _text(ROWS_RIGHT + 13.5, end + 4, str(count), 11, color, "bold"),
            ]

    def _port(self, layer: str, pair: tuple[str, str], lanes: dict[tuple[str, str], int]) -> float:
        """Return where an arrow meets a row: incoming ones above outgoing ones, so that no two share a place."""
        incoming = sorted((p for p in lanes if p[1] == layer), key=lambda p: -lanes[p])
        outgoing = sorted((p for p in lanes if p[0] == layer), key=lambda p: -lanes[p])
        ends = [*reversed(incoming), *outgoing]
        y, height = self._rows[layer]
        return y + height / 2 + PORT * (ends.index(pair) - (len(ends) - 1) / 2)


def _lane(number: int) -> int:
    return ROWS_RIGHT + 34 + LANE * number


def _text(
    x: float, y: float, text: str, size: int, color: str = "#555555", weight: str = "normal", family: str = SANS,
    anchor: str = "start",
) -> str:  # fmt: skip
    return (
        f"<text x='{x:g}' y='{y:g}' {family} font-size='{size}' font-weight='{weight}' fill='{color}' "
        f"text-anchor='{anchor}'>{escape(text)}</text>"
    )


def _wrapped(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def kept_content(picture: str) -> str:
    """Return the JSON inside a picture; empty if it has none."""
    _, found, rest = picture.partition("<metadata>")
    text, _, _ = rest.partition("</metadata>")
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") if found else ""


def is_current(graph: grimp.ImportGraph, picture: Path = PICTURE) -> bool:
    """Tell whether `picture` shows what is in `graph`."""
    return picture.exists() and kept_content(picture.read_text(encoding="utf-8")) == read_content(graph).to_json()


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the layers of p2pfl and the imports between them.")
    parser.add_argument("--check", action="store_true", help="do not draw; exit 1 if the picture is out of date")
    check = parser.parse_args().check
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    if not check:
        PICTURE.write_text(Drawing(read_content(graph)).draw(), encoding="utf-8")
    elif not is_current(graph):
        print("docs/images/layers.svg is out of date: run python docs/draw_layers.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The picture of the layers goes stale with the imports it shows, and with nothing else."""

import importlib.util
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import grimp
import pytest


@pytest.fixture(scope="module")
def draw() -> ModuleType:
    # By path: libp2p installs a top-level package `docs` of its own.
    path = Path(__file__).resolve().parents[2] / "docs" / "draw_layers.py"
    spec = importlib.util.spec_from_file_location("draw_layers", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["draw_layers"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def graph() -> grimp.ImportGraph:
    graph = grimp.ImportGraph()
    for module in (
        "p2pfl",
        "p2pfl.core",
        "p2pfl.core.ids",
        "p2pfl.node",
        "p2pfl.node.libp2p",
        "p2pfl.node.libp2p.host",
    ):
        graph.add_module(module)
    graph.add_module("p2pfl.node.driver")
    graph.add_import(importer="p2pfl.node.driver", imported="p2pfl.core.ids")
    return graph


@pytest.fixture
def picture(draw: ModuleType, graph: grimp.ImportGraph, tmp_path: Path) -> Path:
    path = tmp_path / "layers.svg"
    path.write_text(draw.Drawing(draw.read_content(graph)).draw(), encoding="utf-8")
    return path


def test_the_content_is_the_modules_by_layer_and_the_imports_between_layers(
    draw: ModuleType, graph: grimp.ImportGraph
) -> None:
    content = draw.read_content(graph)
    assert [layer.name for layer in content.layers] == [
        "cli", "commands", "simulation", "node", "learning", "gossip", "crypto", "core",
    ]  # fmt: skip
    assert content.layers[3].modules == {"": ["driver"], "libp2p": ["host"]}
    assert content.imports == [("node", "core", 1)]


def test_an_import_that_is_added_changes_the_check(draw: ModuleType, graph: grimp.ImportGraph, picture: Path) -> None:
    assert draw.is_current(graph, picture)
    graph.add_import(importer="p2pfl.node.libp2p.host", imported="p2pfl.core.ids")
    assert not draw.is_current(graph, picture)


def test_so_does_a_module_but_not_an_import_inside_a_layer(
    draw: ModuleType, graph: grimp.ImportGraph, picture: Path
) -> None:
    graph.add_import(importer="p2pfl.node.driver", imported="p2pfl.node.libp2p.host")
    assert draw.is_current(graph, picture)
    graph.add_module("p2pfl.core.wire")
    assert not draw.is_current(graph, picture)


def test_no_picture_is_not_current(draw: ModuleType, graph: grimp.ImportGraph, tmp_path: Path) -> None:
    assert not draw.is_current(graph, tmp_path / "none.svg")


def test_the_picture_is_the_same_each_time_and_is_well_formed(
    draw: ModuleType, graph: grimp.ImportGraph, picture: Path
) -> None:
    text = picture.read_text(encoding="utf-8")
    assert text == draw.Drawing(draw.read_content(graph)).draw()
    root = ET.fromstring(text)  # noqa: S314 - our own text
    shown = {element.text for element in root.iter() if element.tag.endswith("text")}
    assert {"driver", "host", "libp2p/", "ids", "core"} <= shown
    assert json.loads(draw.kept_content(text))["imports"] == [["node", "core", 1]]


def test_check_says_in_one_line_what_to_run(
    draw: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(draw, "PICTURE", tmp_path / "layers.svg")
    monkeypatch.setattr(draw, "is_current", lambda graph: False)
    monkeypatch.setattr(sys, "argv", ["draw_layers.py", "--check"])
    assert draw.main() == 1
    assert capsys.readouterr().err == "docs/images/layers.svg is out of date: run python docs/draw_layers.py\n"

"""The service unit and the container file: what they promise about privileges, secrets and stopping."""

import configparser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from p2pfl.core.config import PeerConfig
from p2pfl.core.errors import InvalidConfig
from p2pfl.node.health import CLIENT_SECONDS
from p2pfl.node.store import CREDENTIAL

ROOT = Path(__file__).parents[2]
UNIT, CONTAINER = ROOT / "packaging/p2pfl@.service", ROOT / "packaging/Containerfile"
LEAVING = 20.0
"""Seconds for goodbyes and the model, beside `stop_seconds`."""


def service() -> configparser.SectionProxy:
    parsed = configparser.RawConfigParser(strict=True)
    parsed.optionxform = str  # type: ignore[assignment,method-assign]
    parsed.read_string(UNIT.read_text())
    return parsed["Service"]


def test_the_unit_gives_a_peer_nothing_but_its_folder_and_the_network() -> None:
    keys = service()
    wanted = {
        "User": "p2pfl", "NoNewPrivileges": "yes", "ProtectSystem": "strict", "ProtectHome": "yes",
        "CapabilityBoundingSet": "", "PrivateDevices": "yes", "StateDirectory": "p2pfl/%i",
        "StateDirectoryMode": "0700", "UMask": "0077", "SystemCallFilter": "@system-service",
    }  # fmt: skip
    assert {key: keys.get(key) for key in wanted} == wanted
    assert keys["LoadCredential"].startswith(f"{CREDENTIAL}:/")
    assert not re.search("passphrase", keys["ExecStart"]), "secrets stand in no command line"


def test_the_unit_waits_for_the_end_of_a_round() -> None:
    keys = service()
    assert float(keys["TimeoutStopSec"]) > PeerConfig(name="ant").stop_seconds + LEAVING
    assert keys["Restart"] == "on-failure"
    assert int(keys["RestartPreventExitStatus"]) == InvalidConfig.exit_code


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here to read the unit")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    text = UNIT.read_text().replace("/opt/p2pfl/bin/p2pfl", "/bin/true").replace("User=p2pfl", "User=root")
    unit = tmp_path / UNIT.name.replace("@", "@ant")
    unit.write_text(text.replace("Group=p2pfl", "Group=root"))
    ended = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)],  # noqa: S607 - wherever it is
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")


def instructions() -> list[list[tuple[str, str]]]:
    """Return the stages, each with its instructions."""
    lines = re.sub(r"^#.*\n", "", CONTAINER.read_text(), flags=re.MULTILINE).replace("\\\n", "").splitlines()
    stages: list[list[tuple[str, str]]] = []
    for line in filter(None, lines):
        name, _, rest = line.partition(" ")
        if name == "FROM":
            stages.append([])
        stages[-1].append((name, rest.strip()))
    return stages


def test_the_image_runs_without_privileges_and_without_what_it_was_built_with() -> None:
    _, final = instructions()
    words = dict(final)
    assert words["USER"] == "10001:10001"
    assert words["VOLUME"] == words["WORKDIR"] == "/peer"
    assert words["STOPSIGNAL"] == "SIGTERM"
    assert json.loads(words["ENTRYPOINT"]) + json.loads(words["CMD"])[:2] == ["p2pfl", "peer", "--quiet"]
    assert not re.search(r"gcc|-dev\b|pip ", " ".join(rest for name, rest in final if name == "RUN"))
    assert [rest for name, rest in final if name == "COPY"] == ["--from=build /opt/p2pfl /opt/p2pfl"]


def test_the_images_health_is_the_endpoints() -> None:
    words = dict(instructions()[1])
    options, _, command = words["HEALTHCHECK"].partition("CMD ")
    assert "/healthz" in json.loads(command)[-1]
    (seconds,) = re.findall(r"--timeout=(\d+)s", options)
    assert int(seconds) <= CLIENT_SECONDS


def test_no_key_and_no_run_gets_into_an_image() -> None:
    first, *rest = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert first == "*"
    sources = {word for name, words in instructions()[0] if name == "COPY" for word in words.split()[:-1]}
    assert sources == {line[1:] for line in rest if line.startswith("!")}
    assert all((ROOT / source).exists() for source in sources)


def _engine() -> str | None:
    for name in ("podman", "buildah", "docker"):
        if shutil.which(name) and not subprocess.run([name, "info"], capture_output=True, check=False).returncode:
            return name
    return None


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_image_is_built_and_knows_its_command() -> None:
    engine = _engine()
    if engine is None:
        pytest.skip("no podman, buildah or docker answers here; the instructions are checked above")
    build = [engine, "build", "-f", str(CONTAINER), "-t", "p2pfl-test", str(ROOT)]
    ended = subprocess.run(build, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    if engine != "buildah":
        shown = subprocess.run([engine, "run", "--rm", "p2pfl-test", "--version"], capture_output=True, check=True)
        assert shown.stdout.startswith(b"p2pfl ")

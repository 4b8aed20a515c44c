"""The operator's handbook does what it says: four organisations follow it, from nothing to a second charter."""

import re
import sys
from pathlib import Path

import pytest

from p2pfl.simulation.credit import write_credits
from tests.docs.handbook import MEMBERS, WAYS, Federation, blocks_of, outline_of

ROOT = Path(__file__).resolve().parents[2]
HANDBOOK = ROOT / "docs" / "operator.md"
NOT_RUN = {
    "console": "installs, or needs systemd, a firewall or other rights",
    "text": "what a command prints",
    "toml": "a part of a file of settings",
}
"""Languages of blocks that no test runs, and why."""

TRANSLATED = {
    HANDBOOK: ROOT / "docs" / "operator.zh.md",
    ROOT / "README.md": ROOT / "README.zh.md",
}


def tables(federation: Federation) -> None:
    """Give each organisation the table that the handbook takes for granted."""
    for member, table in zip(
        federation.members,
        write_credits(federation.members[0].folder.parent / "made", len(MEMBERS), 0.5, 0).banks,
        strict=True,
    ):
        table.rename(member.folder / "credits.csv")


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="the handbook is for Linux: GNU sed, sha256sum")
def test_four_organisations_follow_the_handbook(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    tables(federation)
    printed = [federation.run(block) for block in blocks_of(HANDBOOK.read_text("utf-8")) if block.language == "sh"]
    ends = [text for outputs in printed for text in outputs.values() if "models agree" in text]
    assert len(ends) == 2 * len(MEMBERS)


def test_each_block_of_the_handbook_is_run_or_says_by_its_language_why_not() -> None:
    for block in blocks_of(HANDBOOK.read_text("utf-8")):
        assert block.way in WAYS if block.language == "sh" else block.language in NOT_RUN, f"line {block.line}"


def test_messages_in_the_table_of_faults_are_what_the_program_says() -> None:
    code = "\n".join(path.read_text("utf-8") for path in (ROOT / "p2pfl").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    table = HANDBOOK.read_text("utf-8").partition("## Faults")[2].partition("## Reference")[0]
    for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
        for message in re.findall(r"`(.*?)`", row):
            # What stands between the check's name, figures, paths, members and what the operating system says.
            message = re.sub(r"^(FAIL|warn) \w+", "", message).removeprefix(" of bank-b")  # noqa: PLW2901
            parts = re.split(r"…|\d+|; |: |Connection refused|No space left on device", message)
            for part in parts:
                assert part.strip() in code, f"{message}: {part!r}"


@pytest.mark.parametrize("page", TRANSLATED, ids=lambda page: page.name)
def test_a_translation_has_the_same_commands_and_the_same_outline(page: Path) -> None:
    english, chinese = page.read_text("utf-8"), TRANSLATED[page].read_text("utf-8")
    assert outline_of(chinese) == outline_of(english)
    assert commands_of(chinese) == commands_of(english)


def commands_of(page: str) -> list[str]:
    """Return a page's commands in order, fenced or indented, without the comments behind them."""
    fenced = [line for block in blocks_of(page) if block.language == "sh" for line in block.text.splitlines()]
    indented = [line.strip() for line in page.splitlines() if line.startswith("    ")]
    known = ("p2pfl ", "make ", "printf ", "for bank")
    return [line.partition("  #")[0].rstrip() for line in [*fenced, *indented] if line.startswith(known)]

"""The cipher suites of this machine, for a terminal."""

from rich.console import Group
from rich.table import Table
from rich.text import Text

from p2pfl.node.speed import SuiteReport, SuiteRow, measure_suites


def render_suites(report: SuiteReport | None = None) -> Group:
    """Return a table of every algorithm in force, which library serves it and its speed now, and notes below.

    In brackets: another library that could serve, and its speed.
    """
    known = report or measure_suites()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("suite", "use", "algorithm", "SM", "library"):
        table.add_column(title, no_wrap=True)
    table.add_column("speed", justify="right", no_wrap=True)
    for row in known.rows:
        library = f"{row.library} {row.version}"
        table.add_row(row.suite, row.use, row.algorithm, "yes" if row.is_sm else "no", library, _speed(row))
        for other in row.others:
            speed = f"({_megabytes(other.megabytes_per_second)})"
            table.add_row("", "", "", "", f"({other.library} {other.version})", speed)
    return Group(table, Text(), *map(Text, known.notes))


def _speed(row: SuiteRow) -> str:
    if row.megabytes_per_second is not None:
        return _megabytes(row.megabytes_per_second)
    return "" if row.microseconds is None else f"{row.microseconds:,.0f} µs"


def _megabytes(per_second: float) -> str:
    return f"{per_second:,.0f} MB/s"

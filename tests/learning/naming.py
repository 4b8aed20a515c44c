"""Names of parametrized cases."""

import re


def named(value: object) -> str:
    """Return a value's repr without addresses, so that each process collects the same cases."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))

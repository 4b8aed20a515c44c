"""The settings of tasks whose data are made up: numbers that have defaults."""

from collections.abc import Mapping

from p2pfl.core.errors import InvalidConfig


def numbers(settings: Mapping[str, object], defaults: Mapping[str, float]) -> list[float]:
    """Return the numbers of a `[data]` table, or their defaults, in the order of the defaults.

    Raises:
        InvalidConfig: a setting is unknown, or no number.
    """
    found = dict(defaults)
    for key, value in settings.items():
        if key not in defaults:
            raise InvalidConfig(f"[data] has the unknown key {key!r}; it may have {', '.join(defaults)}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidConfig(f"[data] {key} is {value!r}; it must be a number")
        found[key] = float(value)
    return list(found.values())

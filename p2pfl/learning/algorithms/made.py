"""Algorithms by their names and options, as scenarios and charters give them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast, get_type_hints

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.algorithms import ALGORITHMS
from p2pfl.learning.algorithms.algorithm import Algorithm
from p2pfl.learning.algorithms.choco import ChocoSgd
from p2pfl.learning.algorithms.partial_sharing import PartialSharing


def make_algorithm(name: str, options: Mapping[str, Any], choco: ChocoSgd | None = None) -> Algorithm:
    """Make an algorithm.

    Args:
        name: a key of `ALGORITHMS`, or `d-psgd`, which is `local-sgd` as it is.
        options: plain values, by the names of the algorithm's fields. `partial-sharing` has `personal`, a list, and
            `inner`, the name of an algorithm whose options are among these; `local-sgd` unless given.
        choco: what `choco-sgd` is, whose compressor is no plain value; None where there is none.

    Raises:
        InvalidConfig: there is no such algorithm, or an option is none of its own or out of range.
    """
    if name != PartialSharing.name:
        return _plain(name, options, choco)
    inner, personal = options.get("inner", "local-sgd"), options.get("personal")
    if not isinstance(inner, str) or inner == name:
        raise InvalidConfig(f"training.options: inner is the name of another algorithm, not {inner!r}")
    if not isinstance(personal, list | tuple) or not personal or not all(isinstance(each, str) for each in personal):
        raise InvalidConfig('training.options: partial-sharing needs personal, such as personal = ["2"]')
    rest = {key: value for key, value in options.items() if key not in ("inner", "personal")}
    return PartialSharing(_plain(inner, rest, choco), tuple(personal))


def options_of(algorithm: Algorithm) -> dict[str, Any]:
    """Return all options of an algorithm, defaults too, by which `make_algorithm` would make it."""
    if isinstance(algorithm, PartialSharing):
        return {"personal": algorithm.personal, "inner": algorithm.inner.name, **options_of(algorithm.inner)}
    return {field.name: getattr(algorithm, field.name) for field in dataclasses.fields(cast(Any, algorithm))}


def _plain(name: str, options: Mapping[str, Any], choco: ChocoSgd | None) -> Algorithm:
    if name == "d-psgd":
        if options:
            raise InvalidConfig("training.options: d-psgd has none; local-sgd is the same and has some")
        name = "local-sgd"
    if name not in ALGORITHMS or (name == ChocoSgd.name and choco is None):
        raise InvalidConfig(f"training.algorithm: {name!r} is unknown; there are d-psgd, {', '.join(ALGORITHMS)}")
    kinds = get_type_hints(ALGORITHMS[name])
    fields = [field.name for field in dataclasses.fields(cast(Any, ALGORITHMS[name]))]
    fields = [] if name == ChocoSgd.name else fields
    for option, value in options.items():
        if option not in fields:
            raise InvalidConfig(f"training.options: {name} has no {option!r}; it has {', '.join(fields) or 'none'}")
        allowed = (int, float) if kinds[option] is float else kinds[option]
        if not isinstance(value, allowed) or (isinstance(value, bool) and kinds[option] is not bool):
            raise InvalidConfig(f"training.options: {option} is a {kinds[option].__name__}, not {value!r}")
    if choco is not None and name == ChocoSgd.name:
        return choco
    return ALGORITHMS[name](**options)

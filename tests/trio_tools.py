"""Trio in plain pytest functions."""

import functools
from collections.abc import Awaitable, Callable
from typing import Any

import trio

HANG = 30.0
"""Seconds after which a test that waits for something that does not come fails; never waited out otherwise."""


def trio_test(function: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test under trio, failing where it hangs."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        async def guarded() -> None:
            with trio.fail_after(HANG):
                await function(*args, **kwargs)

        trio.run(guarded)

    return run

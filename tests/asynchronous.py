"""Tests that are coroutines."""

from __future__ import annotations

import asyncio
import functools
import gc
from collections.abc import Callable, Coroutine
from typing import Any


def asynchronous(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a coroutine test in a loop of its own; whatever the loop would only log fails it."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        logged: list[dict[str, Any]] = []

        async def watched() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, what: logged.append(what))
            async with asyncio.timeout(30):
                await test(*args, **kwargs)
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, f"tasks are left behind: {left}"
            gc.collect(1)  # an exception that nobody retrieved is only noticed here

        asyncio.run(watched())
        assert not logged, "\n".join(map(str, logged))

    return run

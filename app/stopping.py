"""Hearing that the process is to stop before the server waits for its open responses."""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def on_stop(callback: Callable[[], Any]) -> Iterator[None]:
    """Within it, call ``callback`` in the running loop when a signal asks the process to stop.

    Whoever listens to these signals hears them as before. ASGI says that a server stops only once
    its responses have ended: one that goes on until then would wait for it in vain. Nothing is
    heard outside the main thread, or where nobody listens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    listening = {number: handler for number, handler in before.items() if callable(handler)}

    def hear(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(callback)
        listening[signal.Signals(number)](number, frame)

    for number in listening:
        signal.signal(number, hear)
    try:
        yield
    finally:
        for number, handler in listening.items():
            signal.signal(number, handler)

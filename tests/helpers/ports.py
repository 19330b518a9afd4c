"""Ports in a row that are free."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

_FIRST, _LAST = 20_000, 30_000
"""Below those that the system gives to whoever asks for any."""


def free_ports(count: int) -> int:
    """Return the first of `count` consecutive ports of loopback that nobody listens on."""
    while True:
        first = random.randrange(_FIRST, _LAST)
        with ExitStack() as opened:
            try:
                for port in range(first, first + count):
                    opened.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return first

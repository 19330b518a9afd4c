"""The token of an engine: its server answers those who have it, and no others, since they may change the weights."""

from __future__ import annotations

import secrets

TOKEN = "DAPO_MEGATRON_ENGINE_TOKEN"
"""Environment variable that tells it to an engine's processes: unlike a command line, others cannot read it."""


def make_token() -> str:
    return secrets.token_urlsafe(32)


def authorization(token: str) -> str:
    """Spell the header of a request.

    >>> authorization("s3cret")
    'Bearer s3cret'
    """
    return f"Bearer {token}"

"""This module checks the response format of R1."""

from __future__ import annotations

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def keeps_r1_format(response: str) -> bool:
    """Tell whether a response is `<think>...</think><answer>...</answer>`, with nothing but white space around.

    Each tag must occur exactly once, in this order. Takes time linear in the length of the response.
    """
    if any(response.count(tag) != 1 for tag in TAGS):
        return False
    before, _, rest = response.partition("<think>")
    _, closed, rest = rest.partition("</think>")
    between, opened, rest = rest.partition("<answer>")
    _, ended, after = rest.partition("</answer>")
    return bool(closed and opened and ended) and not (before + between + after).strip()

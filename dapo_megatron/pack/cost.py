"""What a sequence costs to compute, attention included."""

from __future__ import annotations


def cost(slots: int, attention_tokens: float) -> float:
    """Return the time that a sequence of `slots` takes, in tokens' worth of the work that is linear in tokens.

    Causal attention adds slots^2 / attention_tokens: at `attention_tokens` it costs as much as all the rest; math.inf
    leaves it out. By operations, a forward pass over n tokens takes 2 n P with the P parameters of the layers, and
    2 n^2 x layers x width (heads x head size) in QK^T and AV, the masked half left out. So attention_tokens is
    P / (layers x width): 12 x hidden size for the classic layer of 12 x hidden^2 parameters (four parts in attention,
    eight in the MLP), more where the MLP is wider, less where attention runs slower than plain matrix products.
    """
    return slots + slots * slots / attention_tokens

"""Exact order statistics of values that are spread over replicas, without gathering them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from dapo_megatron.algo.replicas import Replicas

_BITS = 8
"""Bits of a value's 32 that each round settles: four rounds, each of one sum."""


def quantiles(values_T: Tensor, fractions: Sequence[float], replicas: Replicas) -> Tensor:
    """Return for each fraction q the smallest value v such that at least q n of all n values are <= v: float32 [Q].

    Always one of the values, so the result does not depend on how they are spread. q = 0 gives the minimum; a fraction
    is the decimal number that it is written as. nan counts as larger than inf. Without values, nan.

    Args:
        values_T: float32 [T], the values of this replica; may be empty.
        fractions: the Q fractions q, from 0 to 1.
    """
    assert values_T.ndim == 1 and values_T.dtype == torch.float32, (values_T.shape, values_T.dtype)
    keys_T = _keys(values_T).sort().values
    count = int(replicas.sum(torch.tensor(keys_T.shape[0])))
    wanted_Q = torch.tensor([max(1, math.ceil(Fraction(str(fraction)) * count)) for fraction in fractions])

    # The key lies in [lowest, lowest + 256 width). Counting up to the ends of all its 256 parts but the last tells
    # which part it is in.
    lowest_Q = torch.full_like(wanted_Q, -(2**31))
    parts = torch.arange(1, 2**_BITS)
    for shift in range(32 - _BITS, -1, -_BITS):
        ends_QP = lowest_Q[:, None] + (parts << shift) - 1
        counts_QP = replicas.sum(torch.searchsorted(keys_T, ends_QP, right=True))
        lowest_Q += (counts_QP < wanted_Q[:, None]).sum(1) << shift
    return _values(lowest_Q)


def _keys(values_T: Tensor) -> Tensor:
    """Return int64 keys in the range of int32, ordered as the values are: floats of one sign are ordered like bits."""
    bits_T = values_T.contiguous().view(torch.int32)
    keys_T = torch.where(bits_T >= 0, bits_T, bits_T ^ 0x7FFFFFFF)
    return torch.where(values_T.isnan(), 0x7FFFFFFF, keys_T).long()


def _values(keys_Q: Tensor) -> Tensor:
    keys_Q = keys_Q.int()
    return torch.where(keys_Q >= 0, keys_Q, keys_Q ^ 0x7FFFFFFF).view(torch.float32)

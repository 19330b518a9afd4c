"""Runs inside vLLM's worker processes on CPU. A sequence comes to the same alone as among others, and experts, which
vLLM keeps in a packed form, are packed again when they change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm import _custom_ops


def keep_rows_apart() -> None:
    """Never let oneDNN multiply a single row.

    With AVX-512, it cuts the sum over more than 1,024 products in another way for one row than for that row among
    others. So the last sequence of a rollout would have other last bits, depending on how long another one had been
    there. A second row costs nothing: the weights are read once.
    """
    multiply: Any = _custom_ops.onednn_mm

    def with_company(handler: Any, x: Any, bias: Any) -> Any:
        if x.numel() != handler.k:
            return multiply(handler, x, bias)
        return multiply(handler, x.reshape(1, -1).repeat(2, 1), bias)[:1].reshape(*x.shape[:-1], -1)

    # vLLM's layers look the name up with every call.
    _custom_ops.onednn_mm = with_company


def let_experts_be_packed(model: Any) -> Callable[[], None]:
    """Have what comes next for the experts of this model packed like what came first.

    vLLM packs them only where it makes the kernel that multiplies by them. New weights would be taken for packed ones.

    Returns:
        To be called once new weights are in use: experts that got none have their kernels back.
    """
    methods: list[Any] = [getattr(module, "quant_method", None) for module in model.modules()]
    kernels = [(method, kernel) for method in methods if (kernel := getattr(method, "moe_kernel", None)) is not None]
    for method, _ in kernels:
        method.moe_kernel = None

    def put_back() -> None:
        for method, kernel in kernels:
            if method.moe_kernel is None:
                method.moe_kernel = kernel

    return put_back

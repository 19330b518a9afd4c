from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from dapo_megatron.actor.cpu import grad_norm


def test_the_norm_is_that_of_all_tensors_together() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in ((3, 5), (1,), (1_000,))]
    norm, per_tensor = grad_norm.l2_norm(2**16, torch.zeros(1), [tensors], False)
    wanted = torch.linalg.vector_norm(torch.cat([tensor.flatten() for tensor in tensors]).double())
    assert (norm.shape, norm.dtype, per_tensor) == ((1,), torch.float32, None)
    assert float(norm) == pytest.approx(float(wanted), rel=1e-6)


@pytest.fixture
def clip_grads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Megatron's module, and what it keeps for when there is no kernel."""
    clip_grads: Any = ModuleType("clip_grads")
    utils: Any = ModuleType("utils")
    utils.local_multi_tensor_l2_norm = clip_grads.l2_norm_impl = object()
    monkeypatch.setitem(grad_norm.sys.modules, "megatron.core.optimizer.clip_grads", clip_grads)
    monkeypatch.setitem(grad_norm.sys.modules, "megatron.core.utils", utils)
    yield clip_grads


def test_it_takes_the_place_of_megatrons_fallback(clip_grads: Any) -> None:
    grad_norm.install()
    assert clip_grads.l2_norm_impl is grad_norm.l2_norm


def test_kernels_of_others_stay(clip_grads: Any) -> None:
    kernel = clip_grads.l2_norm_impl = object()
    grad_norm.install()
    assert clip_grads.l2_norm_impl is kernel

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.distributed import run_distributed

VOCAB, PADDED = 35, 48
WIDE = 152_064
"""Columns of the output layer of Qwen2.5 7B."""


def problem(tokens: int = 23, columns: int = PADDED, vocab: int = VOCAB) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with large values in the padded columns, labels, and a gradient for the log-probs."""
    generator = torch.Generator().manual_seed(5)
    logits_TV = 60 * torch.rand(tokens, columns, generator=generator) - 30
    logits_TV[:, vocab:] = 50.0
    labels_T = torch.randint(vocab, (tokens,), generator=generator)
    return logits_TV, labels_T, torch.randn(tokens, generator=generator)


def reference(
    logits_TV: Tensor, labels_T: Tensor, weights_T: Tensor, temperature: float, vocab: int = VOCAB
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, entropy, top probability and the gradient of the logits, in float64."""
    logits_TV = logits_TV.double().requires_grad_()
    log_p_TV = torch.log_softmax(logits_TV[:, :vocab] / temperature, -1)
    logprobs_T = log_p_TV.gather(1, labels_T[:, None]).squeeze(1)
    (grad_TV,) = torch.autograd.grad((logprobs_T * weights_T).sum(), logits_TV)
    p_TV = log_p_TV.detach().exp()
    return logprobs_T.detach(), -(p_TV * log_p_TV.detach()).sum(-1), p_TV.amax(-1), grad_TV


def world() -> Any:
    return torch.distributed.group.WORLD


def compute(
    shard_TV: Tensor, labels_T: Tensor, weights_T: Tensor, temperature: float, vocab: int = VOCAB
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from dapo_megatron.actor.logprobs import vocab_parallel_logprobs

    shard_TV = shard_TV.clone().requires_grad_()
    logprobs_T, entropy_T, top_prob_T = vocab_parallel_logprobs(
        shard_TV, labels_T, temperature=temperature, vocab_size=vocab, tp_group=world(), with_stats=True
    )
    assert entropy_T is not None and top_prob_T is not None
    assert not entropy_T.requires_grad and not top_prob_T.requires_grad
    (grad_TV,) = torch.autograd.grad((logprobs_T * weights_T).sum(), shard_TV)
    return logprobs_T.detach(), entropy_T, top_prob_T, grad_TV


def assert_exact(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Values to 5e-6. Gradients to 1e-5 of the largest; one in bfloat16 is rounded to it besides."""
    for got_T, want_T in zip(got[:3], want[:3], strict=True):
        assert got_T.dtype is torch.float32
        torch.testing.assert_close(got_T.double(), want_T, rtol=0, atol=5e-6)
    rounding = 2**-8 if got[3].dtype is torch.bfloat16 else 0.0
    torch.testing.assert_close(got[3].double(), want[3], rtol=rounding, atol=1e-5 * float(want[3].abs().amax()))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk_elements", [1, 5 * PADDED, 1 << 24])
def test_matches_float64(alone: Any, temperature: float, chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from dapo_megatron.actor import logprobs

    monkeypatch.setitem(logprobs._CHUNK_ELEMENTS, "cpu", chunk_elements)
    assert_exact(compute(*problem(), temperature), reference(*problem(), temperature))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_vocabulary_matches_float64_of_the_same_logits(alone: Any, dtype: torch.dtype, temperature: float) -> None:
    logits_TV, labels_T, weights_T = problem(9, WIDE, WIDE)
    logits_TV = logits_TV.to(dtype)
    logits_TV[0, labels_T[0]] = 45.0  # a sure one: probability near 1
    got = compute(logits_TV, labels_T, weights_T, temperature, WIDE)
    assert_exact(got, reference(logits_TV, labels_T, weights_T, temperature, WIDE))


def test_same_logprobs_with_and_without_statistics_and_gradient(alone: Any) -> None:
    """Bit for bit: the ratio of a policy that has not moved is exactly 1."""
    from dapo_megatron.actor.logprobs import vocab_parallel_logprobs

    logits_TV, labels_T, _ = problem()
    options: dict[str, Any] = {"temperature": 0.9, "vocab_size": VOCAB, "tp_group": world()}
    without = vocab_parallel_logprobs(logits_TV, labels_T, **options)
    assert without.entropy_T is None and without.top_prob_T is None
    with_them = vocab_parallel_logprobs(logits_TV.clone().requires_grad_(), labels_T, with_stats=True, **options)
    assert torch.equal(without.logprobs_T, with_them.logprobs_T)


class Allocations(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes; views and results in place are none."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_larger_than_a_chunk_is_allocated(
    alone: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dapo_megatron.actor import logprobs

    logits_TV, labels_T, weights_T = problem(64, 300, 290)
    chunk = 5 * 300
    monkeypatch.setitem(logprobs._CHUNK_ELEMENTS, "cpu", chunk)
    logits_TV = logits_TV.to(dtype).requires_grad_()
    options: dict[str, Any] = {"temperature": 0.9, "vocab_size": 290, "tp_group": world(), "with_stats": True}
    with Allocations() as forward:
        loss = (logprobs.vocab_parallel_logprobs(logits_TV, labels_T, **options).logprobs_T * weights_T).sum()
    with Allocations() as backward:
        loss.backward()
    with Allocations() as evaluation, torch.no_grad():
        logprobs.vocab_parallel_logprobs(logits_TV, labels_T, **options)
    assert 4 * 290 <= forward.largest <= chunk
    assert evaluation.largest == forward.largest
    assert backward.largest <= chunk
    assert logits_TV.grad is not None
    assert logits_TV.grad.data_ptr() == logits_TV.data_ptr()


def test_logits_wanted_after_the_backward_pass_are_refused(alone: Any) -> None:
    """By autograd, rather than to give wrong gradients."""
    from dapo_megatron.actor.logprobs import vocab_parallel_logprobs

    logits_TV, labels_T, _ = problem()
    options: dict[str, Any] = {"temperature": 1.0, "vocab_size": VOCAB, "tp_group": world()}
    weight_VV = torch.eye(PADDED).requires_grad_()
    made_TV = logits_TV @ weight_VV
    loss = vocab_parallel_logprobs(made_TV, labels_T, **options).logprobs_T.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    made_TV = logits_TV @ weight_VV
    squares = made_TV.square().sum()
    loss = vocab_parallel_logprobs(made_TV, labels_T, **options).logprobs_T.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def _on_rank(temperature: float) -> tuple[Tensor, ...]:
    torch.distributed.init_process_group("gloo")
    group = world()
    logits_TV, labels_T, weights_T = problem()
    result = compute(logits_TV.chunk(group.size(), dim=1)[group.rank()], labels_T, weights_T, temperature)
    torch.distributed.destroy_process_group()
    return result


@pytest.mark.multiproc
@pytest.mark.parametrize("ranks", [3, 4])
def test_split_vocabulary_matches_float64(ranks: int) -> None:
    """With four ranks of 12 columns, the third holds one column of padding, the last nothing else."""
    want = reference(*problem(), 0.6)
    results = run_distributed(_on_rank, ranks, 0.6)
    grad_TV = torch.cat([grad_TV for *_, grad_TV in results], dim=1)
    for *values, _ in results:
        assert_exact((*values, grad_TV), want)


def test_wrong_shapes_are_refused(alone: Any) -> None:
    from dapo_megatron.actor.logprobs import vocab_parallel_logprobs

    with pytest.raises(ValueError, match=r"labels \(3,\)"):
        vocab_parallel_logprobs(
            torch.zeros(4, 8),
            torch.zeros(3, dtype=torch.int64),
            temperature=1.0,
            vocab_size=8,
            tp_group=world(),
        )

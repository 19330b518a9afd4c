from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.distributed import run_distributed

VOCAB, PADDED = 35, 48


def problem(tokens: int = 23) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with large values in the padded columns, labels, and a gradient for the log-probs."""
    generator = torch.Generator().manual_seed(5)
    logits_TV = 4 * torch.randn(tokens, PADDED, generator=generator)
    logits_TV[:, VOCAB:] = 50.0
    labels_T = torch.randint(VOCAB, (tokens,), generator=generator)
    return logits_TV, labels_T, torch.randn(tokens, generator=generator)


def reference(temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropy and the gradient of the logits, in float64."""
    logits_TV, labels_T, weights_T = problem()
    logits_TV = logits_TV.double().requires_grad_()
    log_p_TV = torch.log_softmax(logits_TV[:, :VOCAB] / temperature, -1)
    logprobs_T = log_p_TV.gather(1, labels_T[:, None]).squeeze(1)
    (grad_TV,) = torch.autograd.grad((logprobs_T * weights_T).sum(), logits_TV)
    return logprobs_T.detach(), -(log_p_TV.exp() * log_p_TV).sum(-1).detach(), grad_TV


def world() -> Any:
    return torch.distributed.group.WORLD


def compute(group: Any, temperature: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    from dapo_megatron.actor.logprobs import vocab_parallel_logprobs

    logits_TV, labels_T, weights_T = problem()
    shard_TV = logits_TV.chunk(group.size(), dim=1)[group.rank()].to(dtype).contiguous().requires_grad_()
    logprobs_T, entropy_T = vocab_parallel_logprobs(
        shard_TV, labels_T, temperature=temperature, vocab_size=VOCAB, tp_group=group, with_entropy=True
    )
    assert entropy_T is not None
    (grad_TV,) = torch.autograd.grad((logprobs_T * weights_T).sum(), shard_TV)
    return logprobs_T.detach(), entropy_T, grad_TV


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk_elements", [1, 5 * PADDED, 1 << 24])
def test_matches_float64(alone: Any, temperature: float, chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from dapo_megatron.actor import logprobs

    monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS", chunk_elements)
    for got, want in zip(compute(world(), temperature), reference(temperature), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_bfloat16_logits_are_computed_in_float32(alone: Any) -> None:
    from dapo_megatron.actor.logprobs import vocab_parallel_logprobs

    logits_TV, labels_T, _ = problem()
    options: dict[str, Any] = {"temperature": 1.0, "vocab_size": VOCAB, "tp_group": world()}
    low, _ = vocab_parallel_logprobs(logits_TV.bfloat16(), labels_T, **options)
    high, _ = vocab_parallel_logprobs(logits_TV.bfloat16().float(), labels_T, **options)
    assert low.dtype is torch.float32
    assert torch.equal(low, high)


def test_entropy_only_when_asked_and_same_logprobs(alone: Any) -> None:
    from dapo_megatron.actor.logprobs import vocab_parallel_logprobs

    logits_TV, labels_T, _ = problem()
    options: dict[str, Any] = {"temperature": 0.9, "vocab_size": VOCAB, "tp_group": world()}
    without, nothing = vocab_parallel_logprobs(logits_TV, labels_T, **options)
    with_it, entropy_T = vocab_parallel_logprobs(logits_TV, labels_T, with_entropy=True, **options)
    assert nothing is None
    assert entropy_T is not None
    assert not entropy_T.requires_grad
    assert torch.equal(without, with_it)


def _on_rank() -> tuple[Tensor, Tensor, Tensor]:
    torch.distributed.init_process_group("gloo")
    return compute(world(), 0.6)


@pytest.mark.multiproc
def test_split_vocabulary_matches_float64() -> None:
    """Four ranks of 12 columns: the third holds one column of padding, the last nothing else."""
    logprobs_T, entropy_T, grad_TV = reference(0.6)
    results = run_distributed(_on_rank, 4)
    for got_logprobs_T, got_entropy_T, _ in results:
        torch.testing.assert_close(got_logprobs_T.double(), logprobs_T, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got_entropy_T.double(), entropy_T, rtol=1e-5, atol=1e-6)
    got_grad_TV = torch.cat([grad for *_, grad in results], dim=1)
    torch.testing.assert_close(got_grad_TV.double(), grad_TV, rtol=1e-5, atol=1e-6)


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

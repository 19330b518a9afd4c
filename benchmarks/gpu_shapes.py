"""Models of well-known shapes with random weights, packed batches for them, and what they cost in operations."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoConfig

from dapo_megatron.actor.architecture import head_size
from dapo_megatron.pack.microbatch import build
from dapo_megatron.types import MicroBatch, TrainSample

_QWEN2: dict[str, Any] = {
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 1_000_000.0, "rope_type": "default"},
    "max_position_embeddings": 32_768,
}
SHAPES: dict[str, dict[str, Any]] = {
    "7b": {
        **_QWEN2,
        "hidden_size": 3_584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
    "0.5b": {
        **_QWEN2,
        "hidden_size": 896,
        "intermediate_size": 4_864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "tiny": {
        **_QWEN2,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1_024,
        "tie_word_embeddings": False,
    },
}
"""What config.json says. `tiny` shows on any machine that a bench runs."""


class RandomWeights:
    """A checkpoint (`actor.Checkpoint`) without files."""

    def __init__(self, shape: dict[str, Any], layers: int | None = None) -> None:
        self.hf_config: Any = AutoConfig.for_model(
            **{**shape, "num_hidden_layers": layers or shape["num_hidden_layers"]}
        )

    def load(self, chunks: Sequence[torch.nn.Module], together: Callable[[str], object]) -> None:
        with torch.no_grad():
            for name, param in (pair for chunk in chunks for pair in chunk.named_parameters()):
                if param.dim() > 1:
                    param.normal_(std=0.02)
                else:
                    param.fill_(1.0 if "norm" in name and "bias" not in name else 0.0)


def micro_batch(lengths: Sequence[int], vocabulary: int, *, prompt: int, seed: int) -> MicroBatch:
    """Pack random sequences of `lengths` slots; all but the first `prompt` tokens of each are trained on."""
    generator = torch.Generator().manual_seed(seed)
    samples = [
        TrainSample(
            token_ids=torch.randint(vocabulary, (length + 1,), generator=generator).int(),
            loss_mask=torch.arange(length + 1) >= prompt,
            rollout_logprobs=torch.zeros(length + 1),
            advantage=1.0 if group % 2 else -1.0,
            group=group,
        )
        for group, length in enumerate(lengths)
    ]
    return build(samples, sequence_multiple=1, total_multiple=1)


def ragged(tokens: int, shortest: int, longest: int) -> list[int]:
    """Lengths from `shortest` to `longest` that fill `tokens`: the longest ones halved until the rest is filled."""
    lengths: list[int] = []
    length = longest
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(length, left))
        length = max(shortest, length // 2)
    return lengths


def model_flops(hf_config: Any, batches: Sequence[MicroBatch]) -> float:
    """Return the operations of one forward and backward pass, 2 for a multiplication with its addition.

    Of matrix products with weights, three times the forward pass, the output layer for scored slots only; and of causal
    attention, half of the square. What is computed again by choice does not count.
    """
    hidden, layers = hf_config.hidden_size, hf_config.num_hidden_layers
    queries = head_size(hf_config) * hf_config.num_attention_heads
    keys = head_size(hf_config) * hf_config.num_key_value_heads
    weights = layers * hidden * (2 * queries + 2 * keys + 3 * hf_config.intermediate_size)
    forward = 0.0
    for batch in batches:
        lengths = batch.cu_seqlens.diff().double()
        forward += 2.0 * weights * batch.slots
        forward += 2.0 * hidden * hf_config.vocab_size * int(batch.scored_T.sum())
        forward += layers * 2 * 2 * queries * float((lengths**2 / 2).sum())
    return 3 * forward


def gemm_flops_per_second(size: int = 8_192, repeats: int = 20) -> float:
    """Measure a square product in bfloat16, on the GPU or, small, on CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, repeats = (size, repeats) if device == "cuda" else (1_024, 3)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        torch.mm(a, b)
    return 2 * size**3 * repeats / seconds(lambda: [torch.mm(a, b) for _ in range(repeats)])


def seconds(work: Callable[[], Any]) -> float:
    """Run it and return how long it took, until the device is done."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def card() -> str:
    """Name the device that is measured."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def verdict(what: str, met: bool) -> bool:
    """Print a target's line, which `gpu_report` collects."""
    print(f"target: {what}: {'met' if met else 'MISSED'}", flush=True)
    return met

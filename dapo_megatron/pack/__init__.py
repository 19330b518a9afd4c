"""Samples to micro-batches: shuffled, split into mini-batches, balanced over ranks, packed without padding between."""

from dapo_megatron.pack.stats import PackStats
from dapo_megatron.pack.updates import pack

__all__ = ["PackStats", "pack"]

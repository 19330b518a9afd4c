"""Packs samples into micro-batches: shuffled, split into mini-batches, balanced over replicas, end to end."""

from dapo_megatron.pack.mini_batches import pack
from dapo_megatron.pack.stats import packing

__all__ = ["pack", "packing"]

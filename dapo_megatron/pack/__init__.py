"""Packs samples into micro-batches: shuffled, split into mini-batches, balanced over replicas, end to end.

The leader decides who goes where (`pack`) and sends every replica its samples (`Share`); tensors of micro-batches are
made where they are used.
"""

from dapo_megatron.pack.mini_batches import Packed, pack
from dapo_megatron.pack.share import Share
from dapo_megatron.pack.stats import packing

__all__ = ["Packed", "Share", "pack", "packing"]

"""Reinforcement learning of reasoning models with DAPO on a Megatron-core actor."""

from dapo_megatron import lean

__version__ = "0.1.0"

lean.install()

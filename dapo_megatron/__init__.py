"""Reinforcement learning of reasoning models with DAPO on a Megatron-core actor."""

__version__ = "0.1.0"

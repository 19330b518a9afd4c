"""Advantages, losses and filters: functions of tensors that know neither Megatron, nor engines, nor processes."""

"""Converts Hugging Face checkpoints to Megatron's torch_dist format and back, and tells what a checkpoint holds.

One process, no GPU, one tensor of the model in memory at a time. Which tensors Megatron wants, under which keys and in
which chunks, is asked of Megatron's own models, built without data (`layout.py`).
"""

"""Converts a Megatron checkpoint (torch_dist) to Hugging Face's format; see docs/checkpoints.md."""

import sys

from dapo_megatron.convert.main import megatron_to_hf

if __name__ == "__main__":
    sys.exit(megatron_to_hf())

"""Converts a Hugging Face checkpoint to Megatron's torch_dist format; see docs/checkpoints.md."""

import sys

from dapo_megatron.convert.main import hf_to_megatron

if __name__ == "__main__":
    sys.exit(hf_to_megatron())

"""Converts a Megatron checkpoint (torch_dist) to Hugging Face's format; see docs/checkpoints.md."""

import sys

from dapo_megatron.signals import end_when_interrupted

if __name__ == "__main__":
    end_when_interrupted()
    from dapo_megatron.convert.main import megatron_to_hf

    sys.exit(megatron_to_hf())

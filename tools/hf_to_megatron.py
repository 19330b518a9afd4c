"""Converts a Hugging Face checkpoint to Megatron's torch_dist format; see docs/checkpoints.md."""

import sys

from dapo_megatron.signals import end_when_interrupted

if __name__ == "__main__":
    end_when_interrupted()
    from dapo_megatron.convert.main import hf_to_megatron

    sys.exit(hf_to_megatron())

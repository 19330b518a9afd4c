"""Tells what a checkpoint holds; see docs/checkpoints.md."""

import sys

from dapo_megatron.signals import end_when_interrupted

if __name__ == "__main__":
    end_when_interrupted()
    from dapo_megatron.convert.main import inspect_checkpoint

    sys.exit(inspect_checkpoint())

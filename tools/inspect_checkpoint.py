"""Tells what a checkpoint holds; see docs/checkpoints.md."""

import sys

from dapo_megatron.convert.main import inspect_checkpoint

if __name__ == "__main__":
    sys.exit(inspect_checkpoint())

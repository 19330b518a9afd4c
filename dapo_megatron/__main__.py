"""`python -m dapo_megatron` is `dapo-megatron`."""

import sys

from dapo_megatron.cli import main

if __name__ == "__main__":  # processes that are spawned import this file again
    sys.exit(main())

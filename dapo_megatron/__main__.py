"""`python -m dapo_megatron` is `dapo-megatron`."""

import sys

from dapo_megatron.cli import main

sys.exit(main())

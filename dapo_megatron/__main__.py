"""`python -m dapo_megatron` is `dapo-megatron`."""

import sys

from dapo_megatron.signals import end_when_interrupted


def main() -> int:
    end_when_interrupted()
    from dapo_megatron import cli

    return cli.main()


if __name__ == "__main__":  # processes that are spawned import this file again
    sys.exit(main())

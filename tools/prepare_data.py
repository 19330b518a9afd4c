"""Makes the files that a run trains and evaluates on; see docs/data.md."""

import sys

from dapo_megatron.signals import end_when_interrupted

if __name__ == "__main__":
    end_when_interrupted()
    from dapo_megatron.prepare.main import prepare_data

    sys.exit(prepare_data())

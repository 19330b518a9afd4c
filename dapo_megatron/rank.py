"""The process of one rank: reads the configuration, trains, and says how it ended."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import FrameType

from dapo_megatron import config_file
from dapo_megatron.data.tokenizer import decoder
from dapo_megatron.errors import DapoError
from dapo_megatron.obs.observer import NullObserver, RunObserver
from dapo_megatron.obs.terminal import printable
from dapo_megatron.preflight import preflight
from dapo_megatron.processes import end_with_parent
from dapo_megatron.train import train


def main(argv: Sequence[str] | None = None) -> int:
    """Run under torchrun. Returns the exit code: 2 for input that cannot work, 1 for a run that failed."""
    path, *overrides = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, _terminate)
    end_with_parent()
    rank = int(os.environ.get("RANK", "0"))
    is_leader = rank == 0
    if not is_leader:  # the leader's go to its log, and say the same
        warnings.simplefilter("ignore")
    says = "dapo-megatron: error:" if is_leader else f"dapo-megatron: rank {rank}: error:"
    try:
        config = config_file.load(Path(path), overrides)
        checked = None
        if is_leader:
            world_size = int(os.environ.get("WORLD_SIZE", "1"))
            checked = preflight(config, world_size, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
        with closing(RunObserver(config, decoder(checked.tokenizer)) if checked else NullObserver()) as obs:
            for warning in checked.warnings if checked else ():
                obs.message(f"warning: {warning}")
            train(config, obs, checked)
    except DapoError as error:
        print(says, printable(str(error)), file=sys.stderr, flush=True)
        return error.exit_code
    except RuntimeError as error:
        # What gloo raises when another rank is gone; that rank, or who started it, says why.
        if "Connection" not in str(error):
            raise
        print(f"dapo-megatron: rank {rank}: lost the connection to another rank", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        if is_leader:
            print("dapo-megatron: interrupted", file=sys.stderr, flush=True)
        return 130
    return 0


def _terminate(signum: int, frame: FrameType | None) -> None:
    """Turn SIGTERM into an exception, so that engines are ended and files closed on the way out."""
    sys.exit(128 + signum)

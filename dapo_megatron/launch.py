"""How ranks were started: what cannot work is refused, and what may end badly is said."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

import psutil

from dapo_megatron.config import RunConfig
from dapo_megatron.errors import ConfigError

CLOSE_SECONDS = 10.0
"""For closing everything once it is said why a run ends. torchrun kills what is left of it 30 seconds after its first
rank has ended."""


def check_launch(environ: Mapping[str, str], run: RunConfig) -> None:
    """
    Raises:
        ConfigError: where ranks were not started by torchrun, or starting them again would do harm.
    """
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", "1"))
    advice = "start one task per machine that runs torchrun, for example srun --ntasks-per-node=1 torchrun ..."
    if "RANK" not in environ and tasks > 1:
        raise ConfigError(f"srun started {tasks} tasks, each of them a run of its own: RANK is not set; {advice}")
    needed = ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    missing = [name for name in needed if name not in environ]
    if int(environ.get("WORLD_SIZE", "1")) > 1 and missing:
        raise ConfigError(f"WORLD_SIZE is {environ['WORLD_SIZE']}, but {', '.join(missing)} is not set; {advice}")
    restarts = int(environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and run.existing != "resume":
        raise ConfigError(
            f"torchrun --max-restarts={restarts} would start the run again from its first step, in the same folder; "
            f"leave it at 0, or set run.existing=resume"
        )
    if restarts and run.max_hours is not None:
        raise ConfigError(
            f"torchrun --max-restarts={restarts} would start a run that ends before run.max_hours({run.max_hours:g}) "
            f"again at once, with as many hours before it; leave one of them out"
        )


def saving_is_cut_short(environ: Mapping[str, str], command: Sequence[str], signal_seconds: float) -> str | None:
    """Warn where torchrun kills ranks sooner after a signal than they may take to save; None where it does not.

    Args:
        command: torchrun's command line.
    """
    # `dapo-megatron train` keeps signals from torchrun, which then has no limit.
    if "SIGTERM" not in environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", ""):
        return None
    option = re.search(r"--shutdown[-_]timeout[= ](\d+)", " ".join(command))
    seconds = int(option[1] if option else environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
    needed, possible = signal_seconds + CLOSE_SECONDS, max(1.0, seconds - CLOSE_SECONDS)
    if seconds >= needed:
        return None
    return (
        f"torchrun kills ranks {seconds} s after it has passed on a signal, but saving may take "
        f"checkpoint.signal_seconds({signal_seconds:g}), and closing {CLOSE_SECONDS:g} s more; start it with "
        f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT={needed:.0f} in its environment, or set "
        f"checkpoint.signal_seconds={possible:g} or less"
    )


def parent_command() -> list[str]:
    """Return the command line of the process that started this one; empty where that cannot be read."""
    try:
        return psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []

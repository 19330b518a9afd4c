"""The section of what is saved on the way."""

from __future__ import annotations

from dapo_megatron.config.section import PositiveFloat, Section


class CheckpointConfig(Section):
    signal_seconds: PositiveFloat = 120.0
    """How long a run that is asked to stop (SIGTERM, SIGUSR1, Ctrl-C, run.max_hours) may take until it has saved; then
    it ends without. Below what the scheduler leaves between its signal and SIGKILL."""

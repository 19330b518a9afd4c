"""The section of what a run keeps to go on from."""

from __future__ import annotations

from dapo_megatron.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section


class CheckpointConfig(Section):
    every: NonNegativeInt = 10
    """Rollout steps between checkpoints; 0 saves only at the end, and when the run is told to stop."""
    every_minutes: PositiveFloat | None = None
    """Save as well when a step ends and the last checkpoint began so long ago."""
    keep_last: PositiveInt = 2
    """Checkpoints to keep; older ones are deleted once a new one is complete."""
    keep_every: PositiveInt | None = None
    """Keep those for good whose step is a multiple of this."""
    keep_best: str | None = None
    """Set of held-out prompts (of eval.sets, or held-out, that of eval.data) by which the best checkpoint is kept for
    good: that with the highest accuracy so far, and the earlier of two alike. The file checkpoints/best names it."""
    asynchronous: bool = True
    """Write while the next step runs; the ranks only wait until their state is copied to host memory."""
    export_hf: bool = False
    """Write the policy as a Hugging Face checkpoint as well, to hf in the checkpoint's folder."""
    write_seconds: PositiveFloat = 3600.0
    """How long writing a checkpoint may take. After that the storage counts as hung, and a run that comes to its next
    checkpoint ends, naming the ranks that have not written."""
    signal_seconds: PositiveFloat = 120.0
    """How long a run that is asked to stop (SIGTERM, SIGUSR1, Ctrl-C, run.max_hours) may take until it has saved; then
    it ends without. Below what the scheduler leaves between its signal and SIGKILL."""

    def due(self, step: int) -> bool:
        """Return whether to save after `step` steps are done, whatever the clock says."""
        return self.every > 0 and step % self.every == 0

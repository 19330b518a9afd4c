"""The section of what is kept of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dapo_megatron.config.section import FilePath, NonNegativeInt, Section


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Results go to dir/name."""
    dir: FilePath = Path("runs")
    """Folder that runs are kept in."""
    existing: Literal["refuse", "rename", "resume"] = "refuse"
    """What to do when dir/name is there already: stop, move it aside to dir/name.1, .2, ..., or go on from its last
    checkpoint (dapo-megatron train --resume). Where it is not there yet, all three begin it."""
    max_hours: Annotated[float, Field(gt=0, le=1e5)] | None = None
    """Save and end, with exit code 75, before the leader's process has run for so long; null is no limit. Below a job's
    time limit by as much as the job takes until its ranks are started."""
    save_hf: bool = True
    """Write the trained policy as a Hugging Face checkpoint to dir/name/hf."""
    sampled_groups: NonNegativeInt = 4
    """Groups per step whose responses are written to rollouts.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard events to dir/name."""
    wandb_project: str | None = None
    """Also log to Weights & Biases (needs the wandb extra)."""
    mlflow_uri: str | None = None
    """Also log to this MLflow server, database, or folder, where mlflow.db is made (needs the mlflow extra)."""

    @property
    def folder(self) -> Path:
        return self.dir / self.name

"""What `against_trl` compares on. Both sides read their sizes here, in environments of their own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Problem:
    """A base model, prompts, and the sizes of a rollout step."""

    folder: Path
    """Holds base/ and train.jsonl."""
    prompts: int
    responses: int
    """To each prompt."""
    mini_batch: int
    """Responses of an optimizer step."""
    prompt_tokens: int
    """Limit on a prompt."""
    response_tokens: int
    """Limit on a response."""
    cache: int
    """Tokens before that limit over which the overlong punishment grows."""
    lr: float
    micro_batch_tokens: int
    """Ours: packed tokens of a forward pass."""
    engines: int
    """Ours: engine.count. With a tiny model an engine is busy with its own Python, and two use two cores."""
    trl_batch: int
    """TRL's per_device_train_batch_size: responses of a forward pass. TRL pads all responses of a step to the longest
    of them, so this does not change how much is padding; on `ragged`, 8 were faster than 32, and 2 no faster than 8."""
    continuous_batching: bool
    """Whether `trl` samples with transformers' continuous batching or with its plain `generate`."""
    steps: int
    warm_up: int
    """First steps that are left out."""

    @property
    def step_responses(self) -> int:
        return self.prompts * self.responses

    @property
    def updates(self) -> int:
        """Optimizer steps of a rollout step."""
        return self.step_responses // self.mini_batch


PROBLEMS = {
    # The quick-start's, with the sizes of configs/quickstart_cpu.yaml.
    "sums": Problem(
        folder=ROOT / ".cache/quickstart/seed0",
        prompts=32,
        responses=16,
        mini_batch=128,
        prompt_tokens=16,
        response_tokens=64,
        cache=16,
        lr=1e-4,
        micro_batch_tokens=16_384,
        engines=2,
        trl_batch=128,
        continuous_batching=False,
        steps=12,
        warm_up=2,
    ),
    # No answer is ever right. The punishment starts at the first token, so that every group has an advantage and every
    # response is trained on; the learning rate is too small to change the lengths.
    "ragged": Problem(
        folder=ROOT / ".cache/ragged",
        prompts=8,
        responses=16,
        mini_batch=32,
        prompt_tokens=32,
        response_tokens=512,
        cache=511,
        lr=1e-6,
        micro_batch_tokens=4_096,
        engines=1,
        trl_batch=8,
        continuous_batching=True,
        steps=4,
        warm_up=1,
    ),
}

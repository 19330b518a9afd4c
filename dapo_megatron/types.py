"""The values that pass between stages: prompts -> rollout -> reward -> advantage -> pack -> update.

Axes in names and docstrings: L tokens of one sequence (prompt and response), T packed tokens of one micro-batch,
S segments (sequences) of one micro-batch, G responses of one group.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import PlainSerializer, PlainValidator

from dapo_megatron.measures import Measures

if TYPE_CHECKING:  # graders and the command line read these types and start without torch
    from torch import Tensor


Decode = Callable[[NDArray[np.int32]], str]
"""Token ids [L] to text, without special tokens. The text is untrusted: model output."""


def _in_json(dtype: str) -> Any:
    """Let pydantic write an array [L] of `dtype` as base64 of its bytes, and read it back."""

    def read(value: str | NDArray[Any]) -> NDArray[Any]:
        if isinstance(value, str):
            return np.frombuffer(base64.b64decode(value, validate=True), dtype)
        return value

    def write(array: NDArray[Any]) -> str:
        return base64.b64encode(array.astype(dtype).tobytes()).decode()

    return PlainValidator(read), PlainSerializer(write, when_used="json")


class FinishReason(StrEnum):
    """Why an engine stopped writing."""

    STOP = "stop"
    """It wrote an end token, which is part of the completion."""
    LENGTH = "length"
    """It ran into the limit on response tokens: the response is truncated."""
    ABORT = "abort"
    """The engine gave the request up."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question.

    >>> Prompt(uid="train.jsonl:12", token_ids=(7, 10, 3, 11), text="7+3=", answer="10").answer
    '10'
    """

    uid: str
    """Unique within a data set: file name and line. Two prompts with the same text keep different uids."""
    token_ids: tuple[int, ...]
    text: str
    """The prompt as the model sees it, template applied."""
    answer: str
    """The gold answer, as the grader wants it."""


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Which weights sampled the tokens [start, end) of a completion: `version` counts how often they were published."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """One sampled response. Two are equal where they are the same object: arrays have no single answer to ==.

    >>> token_ids, logprobs = np.array([10, 2], np.int32), np.array([-0.11, -0.01], np.float32)
    >>> Completion(token_ids, logprobs, FinishReason.STOP, (VersionSpan(0, 0, 2),)).length
    2
    """

    token_ids: Annotated[NDArray[np.int32], *_in_json("<i4")]
    """int32 [L]: generated tokens only, the end token included when there is one."""
    logprobs: Annotated[NDArray[np.float32], *_in_json("<f4")]
    """float32 [L], nats: log-probability of each token under the distribution it was sampled from."""
    finish: FinishReason
    versions: tuple[VersionSpan, ...]
    """Which weights wrote it, at least one span."""
    cached_tokens: int = 0
    """Tokens of the prompt whose keys and values were in the engine's cache."""

    def __post_init__(self) -> None:
        if self.token_ids.shape != self.logprobs.shape or self.token_ids.ndim != 1:
            raise ValueError(
                f"token_ids {self.token_ids.shape} and logprobs {self.logprobs.shape} must be one-dimensional and alike"
            )
        if self.token_ids.dtype != np.int32 or self.logprobs.dtype != np.float32:
            raise ValueError(
                f"token_ids are {self.token_ids.dtype} and logprobs {self.logprobs.dtype}; expected int32 and float32"
            )

    @property
    def length(self) -> int:
        """Number of generated tokens, the end token included."""
        return len(self.token_ids)

    @property
    def truncated(self) -> bool:
        return self.finish is FinishReason.LENGTH


@dataclass(frozen=True, slots=True)
class Group:
    """The G responses to one prompt, graded. Every sequence below has G entries."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    extracted: tuple[str | None, ...]
    """What the grader read as the answers; None where it found none. Untrusted: model output."""
    correct: tuple[bool, ...]
    """Right or wrong, before any shaping. Dynamic sampling looks at this and nothing else."""
    rewards: tuple[float, ...]
    """What the advantage is made of: accuracy, format and length penalty together."""
    timed_out: int = 0
    """Responses whose grading ran out of time. They count as wrong."""
    truncated_right: int = 0
    """Truncated responses whose answer is right, also where `correct` is False because they are truncated."""

    def __post_init__(self) -> None:
        sizes = {len(self.completions), len(self.extracted), len(self.correct), len(self.rewards)}
        if len(sizes) != 1:
            raise ValueError(f"a group needs as many completions as answers, grades and rewards; got sizes {sizes}")


@dataclass(frozen=True, slots=True, eq=False)
class TrainSample:
    """One prompt with one response, ready to be packed: 9 bytes a token.

    >>> import torch
    >>> sample = TrainSample(
    ...     token_ids=torch.tensor([7, 10, 3, 11, 10, 2], dtype=torch.int32),     # prompt, then response
    ...     loss_mask=torch.tensor([False, False, False, False, True, True]),     # response tokens that are trained on
    ...     rollout_logprobs=torch.tensor([0.0, 0.0, 0.0, 0.0, -0.11, -0.01]),    # 0 on the prompt
    ...     advantage=0.87, group=3)
    >>> sample.length, sample.loss_tokens
    (6, 2)
    """

    token_ids: Tensor
    """int32 [L]: prompt, then response."""
    loss_mask: Tensor
    """bool [L]: which tokens are trained on, each predicted from those before it. Never the first."""
    rollout_logprobs: Tensor
    """float32 [L], nats: log-probs of the tokens, as the engine sampled them; 0 where loss_mask is False."""
    advantage: float
    group: int
    """Index of the group among the groups of this rollout."""

    def __post_init__(self) -> None:
        shape = self.token_ids.shape
        if self.loss_mask.shape != shape or self.rollout_logprobs.shape != shape or len(shape) != 1:
            raise ValueError(
                f"token_ids {tuple(shape)}, loss_mask {tuple(self.loss_mask.shape)} and rollout_logprobs "
                f"{tuple(self.rollout_logprobs.shape)} must be one-dimensional and alike"
            )

    @property
    def length(self) -> int:
        return self.token_ids.shape[0]

    @property
    def loss_tokens(self) -> int:
        return int(self.loss_mask.sum())


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences packed end to end without padding between them (THD layout), inputs beside their labels.

    A sequence of L tokens fills L-1 slots: slot t holds token t as input and token t+1 as label. Where a layout wants
    sizes that divide (sequence or context parallel), slots with label 0 and loss_mask False fill the gap.

    >>> import torch
    >>> batch = MicroBatch(
    ...     tokens_T=torch.tensor([7, 10, 3, 11, 10]), labels_T=torch.tensor([10, 3, 11, 10, 2]),
    ...     positions_T=torch.tensor([0, 1, 2, 3, 4]), cu_seqlens=torch.tensor([0, 5], dtype=torch.int32),
    ...     scored_T=torch.tensor([False, False, False, True, True]),
    ...     loss_mask_T=torch.tensor([False, False, False, True, True]),
    ...     advantages_T=torch.full((5,), 0.87), weights_T=torch.ones(5),
    ...     rollout_logprobs_T=torch.tensor([0.0, 0.0, 0.0, -0.11, -0.01]),
    ...     groups_S=torch.tensor([3]))
    >>> batch.slots, batch.loss_tokens
    (5, 2)
    """

    tokens_T: Tensor
    """int64 [T]: inputs."""
    labels_T: Tensor
    """int64 [T]: the tokens after them."""
    positions_T: Tensor
    """int64 [T]: 0, 1, 2, ... starting again with every sequence."""
    cu_seqlens: Tensor
    """int32 [S+1]: sequence s fills slots cu_seqlens[s] to cu_seqlens[s+1], its own padding included."""
    scored_T: Tensor
    """bool [T]: whose label's log-prob is computed; the other slots skip the output layer. Fixed when packing, so that
    every pass over the micro-batch runs the same kernels on the same shapes."""
    loss_mask_T: Tensor
    """bool [T]: whose label is trained on. Never where scored_T is False."""
    advantages_T: Tensor
    """float32 [T]: the advantage of the response."""
    weights_T: Tensor
    """float32 [T]: weight of a token in the loss, that of its scope (`algo.scope`) times that of its correction
    (`algo.correction`). It does not change the denominator."""
    rollout_logprobs_T: Tensor
    """float32 [T], nats: log-probs of the labels, as the engine sampled them."""
    groups_S: Tensor
    """int64 [S]: the group that each sequence belongs to (`TrainSample.group`); -1 for a segment of padding."""
    old_logprobs_T: Tensor | None = None
    """float32 [T], nats: those of the policy at the start of the step, by the trainer; 0 where not scored."""
    ref_logprobs_T: Tensor | None = None
    """float32 [T], nats: those of the frozen reference, where there is a KL term; 0 where not scored."""

    @property
    def slots(self) -> int:
        """The number T of slots, padding included."""
        return self.tokens_T.shape[0]

    @property
    def loss_tokens(self) -> int:
        return int(self.loss_mask_T.sum())


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """One replica's share of a mini-batch, the data of one update."""

    micro_batches: tuple[MicroBatch, ...]
    """Every replica has the same number; one may have no loss tokens."""
    loss_tokens: int
    """Unmasked tokens of the whole mini-batch: all micro-batches of all replicas. The denominator of the loss."""


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What one update (an optimizer step) did, the same on every rank."""

    measures: Measures
    """What the loss measured, over the whole mini-batch, with grad_norm before clipping and the norms by kind."""
    loss_tokens: int
    lr: float
    skipped: str | None = None
    """What was not finite, if the update was skipped for that and the parameters are those of before; else None."""

    def __getitem__(self, metric: str) -> float:
        """Return the value of one measure."""
        return self.measures[metric].value


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """What a loss gives for one micro-batch: sums, never means, for the reduction divides once, by the global count."""

    loss_sum: Tensor
    """0-d: what is minimised, summed over loss tokens; carries the gradient."""
    loss_tokens: Tensor
    """0-d int64: the number of these tokens."""
    measures: Measures = field(default_factory=dict)
    """0-d and detached, over the same tokens."""

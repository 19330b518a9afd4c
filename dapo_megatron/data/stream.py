"""An endless shuffled stream of prompts whose place can be saved."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from dapo_megatron.errors import ConfigError
from dapo_megatron.types import Prompt


class PromptStream:
    """Gives every prompt once per epoch, each epoch in an order of its own that `seed` decides.

    Raises:
        ConfigError: without prompts.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise ConfigError("there are no prompts to draw from")
        self._prompts, self._seed = prompts, seed
        self._digest = _digest(prompts)
        self._start_epoch(0)

    def take(self, count: int) -> list[Prompt]:
        """Return the next `count` prompts. Where an epoch ends between them, the next one begins."""
        taken: list[Prompt] = []
        while len(taken) < count:
            if self._position == len(self._order):
                self._start_epoch(self._epoch + 1)
            indices = self._order[self._position : self._position + count - len(taken)]
            taken += [self._prompts[index] for index in indices]
            self._position += len(indices)
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "size": len(self._prompts),
            "digest": self._digest,
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on where the stream that gave `state` stood.

        Raises:
            ConfigError: where that stream had another seed or other prompts.
        """
        for key, what, here in (
            ("seed", "train.seed", self._seed),
            ("size", "a number of prompts of", len(self._prompts)),
            ("digest", "prompts that come to", self._digest),
        ):
            if state[key] != here:
                raise ConfigError(
                    f"cannot go on with the prompts of a run with {what} {state[key]}: this one has {here}; "
                    f"resume with the same seed and the same data, file names, tokens and answers included (the folder "
                    f"may be another)"
                )
        self._start_epoch(state["epoch"])
        self._position = state["position"]

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._position = epoch, 0
        self._order = list(range(len(self._prompts)))
        random.Random(f"{self._seed}/{epoch}").shuffle(self._order)


def _digest(prompts: Sequence[Prompt]) -> str:
    """A name for what training sees of the prompts, and for their order. `rollouts.jsonl` and samples that are carried
    over refer to uids, so these belong to it.
    """
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.uid, prompt.answer, len(prompt.token_ids)]).encode())
        digest.update(np.array(prompt.token_ids, "<i4").tobytes())
    return digest.hexdigest()[:16]

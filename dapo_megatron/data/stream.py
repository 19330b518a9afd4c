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
        problem = None
        if state["seed"] != self._seed:
            problem = f"the run has drawn its prompts with train.seed {state['seed']}, and here it is {self._seed}"
        elif state["size"] != len(self._prompts):
            problem = f"the run had {state['size']:,} prompts, and here are {len(self._prompts):,}"
        elif state["digest"] != self._digest:
            problem = "the prompts have other file names, tokens or answers than those that the run had so far"
        if problem:
            raise ConfigError(
                f"{problem}; go on with the same data (its folder may be another), or choose another run.name"
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

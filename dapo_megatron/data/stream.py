"""An endless shuffled stream of prompts whose place can be saved."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

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
        self._uids = hashlib.sha256("\n".join(prompt.uid for prompt in prompts).encode()).hexdigest()[:16]
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
            "uids": self._uids,
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on where the stream that gave `state` stood.

        Raises:
            ConfigError: where that stream had another seed or number of prompts.
        """
        for key, here in (("seed", self._seed), ("size", len(self._prompts)), ("uids", self._uids)):
            if state[key] != here:
                raise ConfigError(
                    f"cannot continue the prompts of a run with {key} {state[key]}: this one has {here}; "
                    f"resume with the same data and seed"
                )
        self._start_epoch(state["epoch"])
        self._position = state["position"]

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._position = epoch, 0
        self._order = list(range(len(self._prompts)))
        random.Random(f"{self._seed}/{epoch}").shuffle(self._order)

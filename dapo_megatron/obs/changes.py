"""What may change in the configuration of a run that goes on, and what that does to it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dapo_megatron.config import Config
from dapo_megatron.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Rule:
    allowed: bool
    why: str = ""
    """What an allowed change does to the run, where it does anything; or why it is refused."""


_SAME = Rule(True)
_ROUNDING = Rule(True, "results are the same to rounding")
_ANOTHER = Rule(True, "the run is another one from here on")
_EVALUATIONS = Rule(True, "evaluations before and after are not alike")
_PROMPTS = Rule(False, "it decides on the prompts, and the order in which the run has drawn them")
_SEED = Rule(False, "the order of prompts and every sample come from it")

RULES = {
    "model.path": Rule(True, "its config.json holds the same"),
    "model.dtype": Rule(False, "the weights and the optimizer's state were made in it"),
    "model.trust_remote_code": _SAME,
    "model.layers": _ROUNDING,
    "data.train": Rule(True, "file names, tokens and answers have to be the same"),
    "data": _PROMPTS,
    "parallel": _ROUNDING,
    "parallel.distributed_optimizer": Rule(False, "the optimizer's state has other keys with it than without"),
    "memory": _SAME,
    "launch": _SAME,
    "rollout": _ANOTHER,
    "engine": _ROUNDING,
    "engine.seed": _SEED,
    "weights": _SAME,
    "reward": _ANOTHER,
    "algo": _ANOTHER,
    "optimizer": _ANOTHER,
    "optimizer.precision_aware": Rule(False, "main parameters are saved as 16 bits with it, and as 32 without"),
    "train.steps": _SAME,
    "train.mini_batch": _ANOTHER,
    "train.micro_batch_tokens": _ROUNDING,
    "train.logprob_tokens": _ROUNDING,
    "train.max_skipped_updates": _SAME,
    "train.seed": _SEED,
    "eval": _EVALUATIONS,
    "eval.every": _SAME,
    "checkpoint": _SAME,
    "run": _SAME,
}
"""Key, or the beginning of keys -> what a change means. The longest that fits counts."""


@dataclass(frozen=True, slots=True)
class Change:
    key: str
    old: Any
    new: Any

    @property
    def rule(self) -> Rule:
        return rule(self.key)

    def __str__(self) -> str:
        why = f" ({self.rule.why})" if self.rule.why else ""
        return f"{self.key}: {json.dumps(self.old)} -> {json.dumps(self.new)}{why}"


def changes(old: Config, new: Config) -> list[Change]:
    """Return what differs between two configurations; run.existing, which says how to start, does not count."""
    before, after = (flat(config.model_dump(mode="json")) for config in (old, new))
    keys = [key for key in {**before, **after} if key != "run.existing"]
    return [
        Change(key, before.get(key), after.get(key)) for key in keys if before.get(key, keys) != after.get(key, keys)
    ]


def check_changes(old: Config, new: Config) -> list[Change]:
    """As `changes`.

    Raises:
        ConfigError: for changes with which a run cannot go on, all of them.
    """
    found = changes(old, new)
    refused = [str(change) for change in found if not change.rule.allowed]
    if old.rollout.surplus_groups == "carry" and old.rollout.responses != new.rollout.responses:
        refused.append(
            f"rollout.responses: {old.rollout.responses} -> {new.rollout.responses} (groups that were carried over, "
            f"rollout.surplus_groups=carry, have the old number)"
        )
    if refused:
        raise ConfigError(
            f"run: the run in {new.run.folder} cannot go on with another\n"
            + "".join(f"  {line}\n" for line in refused)
            + "set it back, or choose another run.name"
        )
    return found


def rule(key: str) -> Rule:
    """Return the rule for a key of the configuration."""
    fitting = [start for start in RULES if key == start or key.startswith(f"{start}.")]
    return RULES[max(fitting, key=len)]


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """
    >>> flat({"train": {"steps": 3, "seed": 0}})
    {'train.steps': 3, 'train.seed': 0}
    """
    return dict(_items(values))


def _items(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

from __future__ import annotations

from typing import Any

import pytest

from dapo_megatron import config_file
from dapo_megatron.config import Config
from dapo_megatron.errors import ConfigError
from dapo_megatron.obs.changes import changes, check_changes, flat, rule


def config(**sections: dict[str, Any]) -> Config:
    return config_file.parse({"model": {"path": "x"}, "data": {"train": "x.jsonl"}, **sections})


def test_every_key_has_a_rule() -> None:
    for key in flat(config().model_dump(mode="json")):
        assert rule(key).allowed or rule(key).why, key


@pytest.mark.parametrize(
    ("key", "allowed", "why"),
    [
        ("train.steps", True, ""),
        ("parallel.pp", True, "to rounding"),
        ("parallel.distributed_optimizer", False, "other keys"),
        ("launch.processes", True, ""),
        ("engine.count", True, "to rounding"),
        ("engine.seed", False, "every sample"),
        ("data.train", True, "answers"),
        ("data.prompt_field", False, "prompts"),
        ("model.dtype", False, "optimizer's state"),
        ("algo.dapo.clip_high", True, "another one"),
        ("optimizer.lr", True, "another one"),
        ("optimizer.precision_aware", False, "16 bits"),
        ("eval.every", True, ""),
        ("eval.data", True, "not alike"),
    ],
)
def test_the_longest_rule_counts(key: str, allowed: bool, why: str) -> None:
    found = rule(key)
    assert found.allowed == allowed and why in found.why and bool(why) == bool(found.why)


def test_how_to_start_is_no_change() -> None:
    assert changes(config(run={"existing": "refuse"}), config(run={"existing": "resume"})) == []


def test_a_key_that_only_one_has() -> None:
    """The settings of a loss are there where it is chosen."""
    found = {change.key: (change.old, change.new) for change in changes(config(), config(algo={"loss": "gspo"}))}
    assert found["algo.loss"] == ("dapo", "gspo")
    assert any(key.startswith("algo.gspo.") and old is None and new is not None for key, (old, new) in found.items())
    assert any(key.startswith("algo.dapo.") and old is not None and new is None for key, (old, new) in found.items())


def test_groups_that_are_carried_over_keep_their_size() -> None:
    old, new = {"responses": 16}, {"responses": 8}
    check_changes(config(rollout=old), config(rollout=new))
    with pytest.raises(ConfigError, match=r"rollout\.responses: 16 -> 8 \(groups that were carried over"):
        check_changes(config(rollout={**old, "surplus_groups": "carry"}), config(rollout=new))

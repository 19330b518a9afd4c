import json
from pathlib import Path

from dapo_megatron.algo.filter import is_mixed

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/algo.json").read_text())["dynamic_sampling"]


def test_groups_are_kept_by_correctness_alone():
    kept = [index for index, (correct, _) in enumerate(GOLDEN["groups"]) if is_mixed(correct)]
    assert kept == GOLDEN["kept_by_acc"]
    assert kept != GOLDEN["kept_by_seq_reward"]


def test_lone_response_is_never_mixed():
    assert not is_mixed([True])
    assert not is_mixed([False])
    assert not is_mixed([])

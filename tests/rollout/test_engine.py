"""Seeds of requests."""

from __future__ import annotations

from itertools import pairwise, product

from dapo_megatron.rollout.engine import request_seed


def test_every_request_of_a_run_has_a_seed_of_its_own() -> None:
    responses = 64
    asked = product((0, 1, 11), (0, 1, 11, "eval"), (0, 1, 10, 11), ("a:1", "a:11", "1/a:1"))
    seeds = sorted(request_seed(*request) for request in asked)
    # An engine counts on from the seed, for the responses to a prompt.
    assert all(after - before > responses for before, after in pairwise(seeds))
    assert seeds[0] >= 0 and seeds[-1] < 2**62


def test_seeds_are_the_same_with_every_python() -> None:
    assert request_seed(0, 3, 17, "train.jsonl:12") == 154_601_940_791_279_214
    assert request_seed(0, "eval", 0, "x:1") == 2_825_827_407_097_735_774

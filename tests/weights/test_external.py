"""A real vLLM that runs already, and whose run before was killed in the middle of a push."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from dapo_megatron.config_file import parse
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.rollout.token import TOKEN, make_token
from dapo_megatron.weights.broadcast import BroadcastPublisher
from dapo_megatron.weights.buckets import describe
from dapo_megatron.weights.verify import Inventory
from tests.weights.test_gloo import BUCKET_BYTES, generate, make_model, weights_of, worst_error

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]


class Killed(BaseException):
    """Nothing that a run would clean up after."""


def test_what_a_killed_run_left_is_cleared_and_the_weights_are_the_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (make_model(seed, tied=True) for seed in (0, 1))
    first.save_pretrained(tmp_path / "model")
    values: dict[str, Any] = {
        "model": {"path": str(tmp_path / "model"), "dtype": "float32"},
        "data": {"train": "unused.jsonl", "max_prompt_tokens": 400},
        "rollout": {"prompts": 4, "responses": 4, "max_response_tokens": 64},
        "train": {"mini_batch": 16, "micro_batch_tokens": 1024},
        "reward": {"overlong": {"punishment": False}},
        "engine": {"startup_seconds": 600},
    }
    inventory = Inventory(**describe(list(weights_of(first).items())))
    monkeypatch.setenv(TOKEN, token := make_token())

    def half() -> Iterator[tuple[str, torch.Tensor]]:
        for index, named in enumerate(weights_of(first).items()):
            if index == 5:
                raise Killed
            yield named

    with closing(Engines(parse(values), tmp_path / "run", ranks=0, token=token)) as there:
        there.wait_ready()
        values["engine"] |= {"placement": "external", "urls": there.urls}
        with closing(Engines(parse(values), tmp_path / "killed", ranks=0)) as engines:
            engines.wait_ready()
            publisher = BroadcastPublisher(inventory, engines, BUCKET_BYTES, timeout_seconds=60)
            with pytest.raises(Killed):
                publisher.push(half(), version=1)
            publisher.close()
        with closing(Engines(parse(values), tmp_path / "next", ranks=0)) as engines:
            engines.wait_ready()
            with closing(BroadcastPublisher(inventory, engines, BUCKET_BYTES, timeout_seconds=60)) as publisher:
                publisher.push(weights_of(second).items(), version=0)
                answers = generate(engines)
                assert worst_error(second, answers) <= 2e-5
                assert worst_error(first, answers) > 0.1

from __future__ import annotations

from typing import Any

import pytest

from dapo_megatron.config_file import parse
from dapo_megatron.rollout.plan import plan


def shown(ranks: int, **engine: Any) -> tuple[str, ...]:
    return plan(parse({"model": {"path": "m"}, "data": {"train": "t"}, "engine": engine}), ranks)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 24)


@pytest.mark.usefixtures("gpus")
def test_engines_of_this_machine_and_their_gpus() -> None:
    assert shown(4, count=2, tensor_parallel=2) == (
        "2 engines (vllm, tensor parallel 2) on this machine, beside the GPUs of its 4 ranks; weights by gloo from "
        "127.0.0.1",
        "  engine 0: GPU 4,5",
        "  engine 1: GPU 6,7",
    )
    assert shown(1, placement="colocated")[0] == (
        "1 engine (vllm, tensor parallel 1) on this machine, on the GPUs of its 1 rank, in turns; weights by gloo from "
        "127.0.0.1"
    )
    assert shown(1, placement="colocated", sleep=False) == (
        "1 engine (vllm, tensor parallel 1) on this machine, on the GPUs of its 1 rank; weights by gloo from 127.0.0.1",
        "  engine 0: GPU 0",
    )


@pytest.mark.usefixtures("gpus")
def test_many_engines_are_not_all_told() -> None:
    lines = shown(4, count=20)
    assert len(lines) == 10 and lines[-1] == "  and 12 more"


def test_on_cpu_a_line_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert shown(2, count=2) == (
        "2 engines (vllm, tensor parallel 1) on this machine, on CPU; weights by gloo from 127.0.0.1",
    )


@pytest.mark.usefixtures("gpus")
def test_engines_that_run_already_and_their_urls() -> None:
    assert shown(24, placement="external", urls=["http://127.0.0.1:81", "http://localhost:82"]) == (
        "2 engines (vllm, tensor parallel 1) run already; weights by gloo from 127.0.0.1",
        "  engine 0: http://127.0.0.1:81",
        "  engine 1: http://localhost:82",
    )
    assert shown(
        24, placement="external", urls=["http://127.0.0.1:81", "http://localhost:82"], kinds=["vllm", "sglang"]
    ) == (
        "2 engines (sglang and vllm, tensor parallel 1) run already; weights by gloo from 127.0.0.1",
        "  engine 0: http://127.0.0.1:81, vllm",
        "  engine 1: http://localhost:82, sglang",
    )

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dapo_megatron.lean import _compiled_when_called

PROGRAM = """
import json, sys
import torch
compile_ = torch.compile
{first}
import dapo_megatron
import megatron.core
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu
names = ("torch._inductor.compile_fx", "wandb", "megatron.core.tensor_parallel")
brought = [name for name in names if name in sys.modules]
print(json.dumps([brought, torch.compile is compile_]))
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA Megatron is imported as ever")
@pytest.mark.parametrize(
    ("first", "brings"),
    [
        ("", ["megatron.core.tensor_parallel"]),
        ("import wandb", ["wandb", "megatron.core.tensor_parallel"]),
        (
            "torch.cuda.is_available = lambda: True",
            ["torch._inductor.compile_fx", "wandb", "megatron.core.tensor_parallel"],
        ),
    ],
    ids=["cpu", "wandb-in-use", "cuda"],
)
def test_megatron_brings_no_compiler_along(first: str, brings: list[str]) -> None:
    pytest.importorskip("wandb")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(first=first)], capture_output=True, text=True, check=True, timeout=120
    )
    brought, as_before = json.loads(done.stdout)
    assert brought == brings and as_before


def test_a_function_is_compiled_when_it_is_first_called() -> None:
    made: list[Any] = []

    def compile_(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        made.append((function.__name__, options))
        return lambda *args: ("compiled", function(*args))

    @_decorator(compile_, dynamic=True)
    def double(x: int) -> int:
        return 2 * x

    assert not made and double.__name__ == "double"
    assert double(3) == double(3) == ("compiled", 6)
    assert made == [("double", {"dynamic": True})]


def test_within_a_compiled_function_it_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _compiled_when_called(lambda function: pytest.fail("compiled"), lambda: "plain")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert plain() == "plain"


def _decorator(compile_: Callable[..., Any], **options: Any) -> Any:
    return _compiled_when_called(compile_, **options)

"""SGLang in its own environment, for the tests that start it."""

from __future__ import annotations

from collections.abc import Iterable

import psutil
import pytest

from dapo_megatron.rollout.adapters import sglang

needs_sglang = [
    pytest.mark.sglang,
    pytest.mark.slow,
    pytest.mark.skipif(not sglang._VENV.exists(), reason="needs SGLang in .venv-sglang: run `make sglang-cpu`"),
]
"""Marks of a module whose tests start it. Importing it takes a minute where cores are busy."""

STARTUP_SECONDS = 600

NOTICED_SECONDS = 5.0
"""Within these the death of an engine is told. SGLang looks after its processes every second."""


def the_model(family: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Of an engine's processes, the one that holds the weights: the first that SGLang spawns."""
    spawned = [process for process in family if any("spawn_main" in word for word in process.cmdline())]
    named = [process for process in family if process.cmdline()[0].startswith("sglang::scheduler")]
    return named or sorted(spawned, key=psutil.Process.create_time)[:1]

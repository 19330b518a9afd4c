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
    """Of an engine's processes, those that hold the weights; each has a name instead of a command line."""
    return [process for process in family if process.cmdline()[0].startswith("sglang::scheduler")]

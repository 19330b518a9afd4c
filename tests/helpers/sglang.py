"""SGLang in its own environment, for the tests that start it."""

from __future__ import annotations

import pytest

from dapo_megatron.rollout.adapters import sglang

needs_sglang = [
    pytest.mark.sglang,
    pytest.mark.slow,
    pytest.mark.skipif(not sglang._VENV.exists(), reason="needs SGLang in .venv-sglang: run `make sglang-cpu`"),
]
"""Marks of a module whose tests start it. Importing it takes a minute where cores are busy."""

STARTUP_SECONDS = 600

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dapo_megatron.mkl import FUNCTIONS, choose_functions

FRESH = """
import torch
from dapo_megatron.mkl import choose_functions
torch.set_num_threads(2)
choose_functions()
angles = torch.outer(torch.arange(512.0), 0.5 ** torch.arange(32.0))
print(float((angles.cos().double() - angles.double().cos()).abs().max()))
"""


def test_it_calls_what_torch_leaves_to_mkl() -> None:
    header = Path(torch.__file__).parent / "include/ATen/cpu/vml.h"
    assert set(re.findall(r"^IMPLEMENT_VML_MKL\((\w+),", header.read_text(), re.MULTILINE)) == set(FUNCTIONS)


def test_each_is_called_for_both_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, torch.dtype, int]] = []
    for name in FUNCTIONS:
        monkeypatch.setattr(torch, name, lambda x, name=name: called.append((name, x.dtype, x.numel())))
    choose_functions()
    assert set(called) == {(name, dtype, 1) for name in FUNCTIONS for dtype in (torch.float32, torch.float64)}


@pytest.mark.slow
@pytest.mark.parametrize("module", ["actor.topology", "weights.workers.vllm"])
def test_actors_and_engines_see_to_it_before_they_have_a_model(module: str) -> None:
    begun = {"actor.topology": "it.initialize(ParallelConfig())", "weights.workers.vllm": ""}
    program = (
        "from dapo_megatron import mkl; mkl.choose_functions = lambda: print('chosen')\n"
        f"from dapo_megatron.config import ParallelConfig; import dapo_megatron.{module} as it; {begun[module]}"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert "chosen" in done.stdout.splitlines(), done.stderr


@pytest.mark.long
@pytest.mark.timeout(900)
def test_cosines_of_processes_that_have_just_started() -> None:
    """Without the call, one or two of a hundred such processes have some that are wrong by 1e-4."""
    errors: list[float] = []
    for _ in range(34):
        started = [subprocess.Popen([sys.executable, "-c", FRESH], stdout=subprocess.PIPE, text=True) for _ in range(6)]
        errors += [float(process.communicate()[0]) for process in started]
    assert max(errors) < 1e-6

"""What vLLM's sleep gives back of a GPU that it has in common with this process."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from dapo_megatron.config_file import parse
from dapo_megatron.rollout.engine import KV_CACHE, WEIGHTS
from dapo_megatron.rollout.engines import Engines

GIB = 2**30
CACHE_GIB = 4


@pytest.mark.vllm
@pytest.mark.gpu
@pytest.mark.timeout(900)
def test_what_sleeps_is_free_for_others_and_comes_back_in_parts(
    tiny_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu_rollout import save_model
    from benchmarks.gpu_shapes import SHAPES

    def used() -> float:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return (total - free) / GIB

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    save_model(tmp_path / "model", SHAPES["0.5b"])
    weights = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors")) / GIB
    engine = {"placement": "colocated", "kv_cache_gib": CACHE_GIB, "startup_seconds": 600}
    model = {"path": str(tmp_path / "model"), "dtype": "bfloat16"}
    before = used()
    with closing(Engines(parse({**tiny_values, "model": model, "engine": engine}), tmp_path, ranks=1)) as engines:
        engines.wait_ready()
        whole = used()
        engines.sleep()
        asleep = used()
        print(f"in use before {before:.2f}, awake {whole:.2f}, asleep {asleep:.2f} GiB; weights {weights:.2f} GiB")
        assert whole - asleep >= 0.9 * (weights + CACHE_GIB)
        assert asleep - before < 3.0, "what stays is a context, libraries and graphs"
        taken = torch.empty(int(0.9 * (whole - asleep) * GIB), dtype=torch.uint8, device="cuda").fill_(1)
        assert float(taken[-1]) == 1
        del taken
        torch.cuda.empty_cache()
        engines.wake(WEIGHTS)
        assert used() - asleep == pytest.approx(weights, abs=0.2 + 0.1 * weights)
        engines.wake(KV_CACHE)
        assert used() == pytest.approx(whole, abs=0.3)

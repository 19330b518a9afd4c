"""A real vLLM server on CPU whose model two processes share, one of which fails in a push."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from dapo_megatron.config_file import parse
from dapo_megatron.errors import EngineError
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.weights.broadcast import BroadcastPublisher
from dapo_megatron.weights.buckets import describe
from dapo_megatron.weights.verify import Inventory
from tests.weights.test_gloo import BUCKET_BYTES, generate, make_model, weights_of, worst_error

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]


def test_after_one_worker_has_failed_they_are_in_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM would give the others' answers for those to the calls that follow."""
    fault = tmp_path / "fault"
    fault.write_text("")
    monkeypatch.setenv("PLANTED_FAULT", str(fault))
    models = [make_model(seed, False) for seed in (0, 1)]
    models[0].save_pretrained(tmp_path / "model")
    values = {
        "model": {"path": str(tmp_path / "model"), "dtype": "float32"},
        "data": {"train": "unused.jsonl", "max_prompt_tokens": 400},
        "rollout": {"prompts": 4, "responses": 4, "max_response_tokens": 64},
        "train": {"mini_batch": 16, "micro_batch_tokens": 1024},
        "reward": {"overlong": {"punishment": False}},
        "engine": {
            "tensor_parallel": 2,
            "startup_seconds": 300,
            "extra_args": ["--worker-extension-cls", "tests.helpers.planted_worker.WorkerExtension"],
        },
    }
    with closing(Engines(parse(values), tmp_path / "run", ranks=0)) as engines:
        engines.wait_ready()
        inventory = Inventory(**describe(list(weights_of(models[0]).items())))
        with closing(BroadcastPublisher(inventory, engines, BUCKET_BYTES, timeout_seconds=30)) as publisher:
            for version in (1, 3, 5):
                model, other = models[version // 2 % 2], models[1 - version // 2 % 2]
                engines.expect(version)
                publisher.push(weights_of(model).items(), version=version)
                assert worst_error(model, generate(engines)) <= 2e-5

                fault.write_text("second")
                with pytest.raises(EngineError, match="engine 0, /update_weights: MemoryError: planted in the second"):
                    publisher.push(weights_of(other).items(), version=version + 1)
                fault.write_text("")
                (engine,) = engines
                engines.run(engine.reset())

            publisher.push(weights_of(models[1]).items(), version=7)
            fault.write_text("forgets")
            says = "model.embed_tokens.weight: the engine has loaded the push, and has other bytes than came"
            with pytest.raises(EngineError, match=says):  # each has only its share of it
                publisher.push(weights_of(models[0]).items(), version=8)

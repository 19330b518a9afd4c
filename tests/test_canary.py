"""A real vLLM server on CPU, a real actor, and faults that are planted between them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dapo_megatron.canary import Canary, differences
from dapo_megatron.config import Config, TrainConfig
from dapo_megatron.config_file import parse
from dapo_megatron.errors import EngineError, WeightsError
from dapo_megatron.heartbeat import Peers
from dapo_megatron.leader import Leader
from dapo_megatron.measures import Sum
from dapo_megatron.pack.microbatch import build
from dapo_megatron.rollout.adapters.vllm import VllmEngine
from dapo_megatron.rollout.engine import KV_CACHE, WEIGHTS, Sampling
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.types import Completion, FinishReason, MicroBatch, MiniBatch, Prompt, TrainSample, VersionSpan
from dapo_megatron.weights import broadcast, buckets
from dapo_megatron.weights.broadcast import BroadcastPublisher
from tests.helpers.models import save_tiny
from tests.weights.test_publish import Keeper

PROMPTS = [Prompt(f"p{i}", tuple(3 + (7 * i + 11 * j) % 70 for j in range(20 + i)), "", "") for i in range(9)]


def sample(engine: int, errors: list[float]) -> TrainSample:
    return TrainSample(
        token_ids=torch.arange(4 + len(errors), dtype=torch.int32),
        loss_mask=torch.arange(4 + len(errors)) >= 4,
        rollout_logprobs=torch.tensor([0.0] * 4 + errors) - 1.0,
        advantage=0.0,
        group=engine,
    )


def test_each_engine_is_compared_by_its_own_tokens() -> None:
    samples = [sample(2, [0.5, -0.25]), sample(0, [0.0, 0.0, 3.0]), sample(3, [math.nan])]
    batch = build(samples, sequence_multiple=4, total_multiple=1)
    idle = build([], sequence_multiple=4, total_multiple=1)
    scored = [replace(x, old_logprobs_T=torch.full_like(x.rollout_logprobs_T, -1.0)) for x in (batch, idle)]
    found = differences([MiniBatch(tuple(scored), 6)], 5)
    assert found[:3].tolist() == [[1.0, 3.0], [0.0, 0.0], [0.375, 0.5]]
    assert found[3].isnan().all() and found[4].tolist() == [0.0, 0.0]


@pytest.fixture(scope="module")
def fault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whoever writes here plants a fault in the engine's workers (`tests.helpers.planted_worker`)."""
    file = tmp_path_factory.mktemp("fault") / "fault"
    file.write_text("")
    return file


def make_config(folder: Path, **engine: Any) -> Config:
    """An engine of a tiny model, whose cache holds more than one block of a prompt."""
    sizes: dict[str, Any] = {"hidden": 128, "vocab_size": 80, "intermediate_size": 160}
    model = save_tiny(folder, "qwen2", tied=False, **sizes)
    return parse(
        {
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"train": "unused.jsonl", "max_prompt_tokens": 200},
            "rollout": {"prompts": 4, "responses": 4, "max_response_tokens": 64, "temperature": 0.9},
            "train": {"mini_batch": 16, "micro_batch_tokens": 1024},
            "reward": {"overlong": {"punishment": False}},
            "engine": {"startup_seconds": 600, **engine},
            "weights": {"push_seconds": 120},
        }
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    extension = ["--worker-extension-cls", "tests.helpers.planted_worker.WorkerExtension"]
    return make_config(tmp_path_factory.mktemp("model"), extra_args=extension)


@pytest.fixture(scope="module")
def engines(config: Any, fault: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLANTED_FAULT", str(fault))
        running = Engines(config, tmp_path_factory.mktemp("run"), ranks=0)
    with closing(running):
        running.wait_ready()
        yield running


class Pushes:
    """Pushes of an actor whose weights change each time."""

    def __init__(self, config: Any, topo: Any, engines: Any) -> None:
        from dapo_megatron.actor.actor import Actor
        from dapo_megatron.weights.hf import HfCheckpoint

        self.checkpoint = HfCheckpoint(config.model.path)
        self.actor = Actor(config, topo, self.checkpoint)
        leader: Any = SimpleNamespace(config=config, engines=engines, _attention_tokens=math.inf)
        leader.pack = partial(Leader.pack, leader)
        # Buckets smaller than most tensors: those that the engine joins come one after the other.
        self.publisher = BroadcastPublisher(self.checkpoint.inventory, engines, 40_000, timeout_seconds=60)
        self.canary = Canary(self.publisher, config, topo, self.actor, leader, PROMPTS, Peers())

    def push(self, version: int) -> Any:
        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for param in self.actor.chunks[0].parameters():
                param.add_(0.02 * torch.randn(param.shape, generator=generator))
        return self.canary.push(self.checkpoint.export(self.actor.chunks), version=version)


class Answering:
    """An engine of whose log-probs each is off by `off`, of tokens that the actor gives log-probs of -1."""

    def __init__(self, name: str, off: float) -> None:
        self.name, self.version, self._off = name, 0, off

    async def generate(self, prompt: Prompt, sampling: Sampling, n: int) -> list[Completion]:
        logprobs = np.full(sampling.max_tokens, self._off - 1.0, np.float32)
        tokens = np.zeros(sampling.max_tokens, np.int32)
        return [Completion(tokens, logprobs, FinishReason.LENGTH, (VersionSpan(1, 0, len(tokens)),))] * n


class Scoring:
    """An actor."""

    def with_old_logprobs(self, mini_batches: Sequence[MiniBatch]) -> tuple[list[MiniBatch], Any]:
        def scored(batch: MicroBatch) -> MicroBatch:
            return replace(batch, old_logprobs_T=torch.full_like(batch.rollout_logprobs_T, -1.0))

        return [replace(x, micro_batches=tuple(map(scored, x.micro_batches))) for x in mini_batches], {}


def push_to(topo: Any, folder: Path, *engines: Answering, gone: int = 0) -> Any:
    """What a canary says that asks these engines. There are more of them than samples of a mini-batch.

    Args:
        gone: engines of the run that are not there.
    """

    class Running(list[Answering]):
        def ask(self, question: Any) -> list[Any]:
            async def answers() -> list[Any]:
                return await asyncio.gather(*map(question, self))

            return asyncio.run(answers())

    config = make_config(folder, count=len(engines) + gone).model_copy(update={"train": TrainConfig(mini_batch=2)})
    leader: Any = SimpleNamespace(config=config, engines=Running(engines), _attention_tokens=math.inf)
    leader.pack = partial(Leader.pack, leader)
    publisher: Any = SimpleNamespace(push=lambda weights, version: {"seconds/verify": Sum(0.0)})
    actor: Any = Scoring()
    return Canary(publisher, config, topo, actor, leader, PROMPTS, Peers()).push(None, version=1)


def test_of_several_engines_those_that_are_off_are_named(alone: Any, tmp_path: Path) -> None:
    right = [Answering(f"engine {index}", 1e-6 * index) for index in range(5)]
    measures = push_to(alone, tmp_path / "right", *right)
    assert measures["verify/canary"].value == pytest.approx(4e-6, abs=1e-7)
    says = (
        r"^engine 3 does not use the weights that it was sent, after the push of version 1\. .*"
        r"engine 2: 2\S+ in the mean, \S+ at most; engine 3: 0\.25 in the mean, .*; others are right"
    )
    with pytest.raises(WeightsError, match=says):
        push_to(alone, tmp_path / "one", *right[:3], Answering("engine 3", 0.25), right[4])
    with pytest.raises(
        WeightsError, match=r"^engine 3 does .* differ .*: engine 1: 1\S+ .*; engine 3: 0.25 in .*others are"
    ):
        push_to(alone, tmp_path / "gone", Answering("engine 1", 1e-6), Answering("engine 3", 0.25), gone=2)
    with pytest.raises(WeightsError, match=r"^engine 0, engine 1 does not use .*all engines are off"):
        push_to(alone, tmp_path / "all", Answering("engine 0", -0.5), Answering("engine 1", 0.5))


class Deaf(Keeper):
    """Takes part in the push, and the engine does not hear of it."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine.name)
        self.generate, self._engine = engine.generate, engine

    async def finish_transfer(self, version: int) -> None:
        await self._engine.control.call("POST", "/update_weight_version", {"new_version": str(version)})
        self._engine.version = version


class DeafEngines:
    """`Engines` that report success and keep the weights that they have."""

    def __init__(self, engines: Engines) -> None:
        self.run, self.ask, self._all = engines.run, engines.ask, [Deaf(engine) for engine in engines]

    def __iter__(self) -> Iterator[Deaf]:
        return iter(self._all)


@pytest.fixture
def pushes(config: Any, alone: Any, engines: Engines) -> Iterator[Pushes]:
    made = Pushes(config, alone, engines)
    with closing(made.canary):
        yield made


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(1200)
class TestWithVllm:
    """In this order: after the last ones, the engine is of no more use."""

    def test_an_engine_that_has_what_was_sent_passes(self, pushes: Pushes) -> None:
        for version in (1, 2, 3):
            measures = pushes.push(version)
            assert 0 < measures["verify/canary"].value <= measures["verify/canary_max"].value <= 2e-5
            assert measures["verify/tensors"].value == 3 + 2 * 12
            assert measures["seconds/verify"].value > 0

    def test_an_engine_that_has_slept_is_woken_and_passes(self, config: Config, alone: Any, engines: Engines) -> None:
        """As colocated engines do; on CPU they forget nothing but what was cached."""
        (engine,) = engines
        assert isinstance(engine, VllmEngine)
        sleeping = config.model_copy(update={"engine": config.engine.model_copy(update={"placement": "colocated"})})
        assert sleeping.engine.sleeps
        pushes = Pushes(sleeping, alone, engines)
        with closing(pushes.canary):
            for version in (3, 4):
                engines.sleep()
                engines.wake(WEIGHTS)
                assert engine.asleep == {KV_CACHE}
                measures = pushes.push(version)
                assert not engine.asleep
                assert 0 < measures["verify/canary"].value <= measures["verify/canary_max"].value <= 2e-5

    def test_a_stale_prefix_cache_is_caught_by_name(
        self, pushes: Pushes, engines: Engines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (engine,) = engines
        assert isinstance(engine, VllmEngine)
        call = engine._transfer.call

        async def keeping_the_cache(method: str, path: str, *more: Any, **options: Any) -> Any:
            if path == "/reset_prefix_cache":
                return {"success": True}
            return await call(method, path.replace("mode=wait", "mode=wait&clear_cache=false"), *more, **options)

        monkeypatch.setattr(engine._transfer, "call", keeping_the_cache)
        says = r"engine 0 has answered with cached keys and values of the old weights, after the push of version 4"
        with pytest.raises(EngineError, match=says):
            pushes.push(4)

    def test_an_engine_that_reports_success_and_kept_the_old_weights_is_caught_by_name(
        self, config: Any, alone: Any, engines: Engines
    ) -> None:
        pushes = Pushes(config, alone, DeafEngines(engines))
        with (
            closing(pushes.canary),
            pytest.raises(EngineError, match="engine 0 does not use the weights that it was sent"),
        ):
            pushes.push(5)

    def test_a_buffer_that_is_reused_too_early_is_caught_by_name(self, pushes: Pushes, fault: Path) -> None:
        fault.write_text("reused")
        with pytest.raises(EngineError, match=r"engine 0, [\s\S]*weight was overwritten in this process before"):
            pushes.push(6)
        fault.write_text("")

    def test_a_flipped_bit_in_a_bucket_is_caught_by_name(
        self, pushes: Pushes, engines: Engines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (engine,) = engines
        engines.run(engine.reset())  # the last push has left it in its middle
        put = buckets.put

        def flipping(tensor: torch.Tensor, flat: torch.Tensor, start: int) -> torch.Tensor:
            place = put(tensor, flat, start)
            flat[start] ^= 1
            return place

        monkeypatch.setattr(broadcast, "put", flipping)
        with pytest.raises(EngineError, match=r"engine 0, [\s\S]*weight has arrived with other bytes than were sent"):
            pushes.publisher.push(pushes.checkpoint.export(pushes.actor.chunks), version=7)

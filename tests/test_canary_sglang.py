"""A real SGLang server on CPU, a real actor, and faults that are planted between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from dapo_megatron.config import Config
from dapo_megatron.errors import EngineError
from dapo_megatron.rollout.adapters import sglang
from dapo_megatron.rollout.adapters.sglang import SglangEngine
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.weights import broadcast, buckets
from dapo_megatron.weights.verify import Tally
from tests.helpers.sglang import STARTUP_SECONDS, needs_sglang
from tests.test_canary import DeafEngines, Pushes, make_config

pytestmark = [*needs_sglang, pytest.mark.timeout(STARTUP_SECONDS + 300)]

KEPT = "model.layers.1.mlp.up_proj.weight"
"""The tensor that `tests.helpers.planted_sglang` keeps."""
TENSORS = 3 + 2 * 12


@pytest.fixture(scope="module")
def fault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whoever writes here plants a fault in the engine's worker (`tests.helpers.planted_sglang`)."""
    file = tmp_path_factory.mktemp("fault") / "fault"
    file.write_text("")
    return file


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_config(tmp_path_factory.mktemp("model"), kind="sglang", startup_seconds=STARTUP_SECONDS)


@pytest.fixture(scope="module")
def engines(config: Config, fault: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sglang, "WORKER", "tests.helpers.planted_sglang")
        patch.setenv("PLANTED_FAULT", str(fault))
        running = Engines(config, tmp_path_factory.mktemp("run"), ranks=0)
    with closing(running):
        running.wait_ready()
        yield running


@pytest.fixture
def engine(engines: Engines) -> SglangEngine:
    (only,) = engines
    assert isinstance(only, SglangEngine)
    return only


@pytest.fixture
def pushes(config: Config, alone: Any, engines: Engines, engine: SglangEngine) -> Iterator[Pushes]:
    """What a push has left open is closed, so that the next one can begin: a run starts the engine again."""
    made = Pushes(config, alone, engines)
    with closing(made.canary):
        yield made

    async def give_up() -> None:
        for path in ("/end_weight_update", "/continue_generation"):
            with suppress(EngineError):
                await engine._transfer.call("POST", path, {})

    engines.run(give_up())


def test_an_engine_that_has_what_was_sent_passes(pushes: Pushes) -> None:
    for version in (1, 2, 3):
        measures = pushes.push(version)
        assert 0 < measures["verify/canary"].value <= measures["verify/canary_max"].value <= 2e-5
        assert measures["verify/tensors"].value == TENSORS


def test_a_stale_prefix_cache_is_caught_by_name(
    pushes: Pushes, engine: SglangEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = engine._transfer.fetch

    async def keeping_the_cache(method: str, path: str, *more: Any, **options: Any) -> Any:
        return b"" if path == "/flush_cache" else await fetch(method, path, *more, **options)

    monkeypatch.setattr(engine._transfer, "fetch", keeping_the_cache)
    says = r"engine 0 has answered with cached keys and values of the old weights, after the push of version 4"
    with pytest.raises(EngineError, match=says):
        pushes.push(4)


def test_an_engine_that_reports_success_and_kept_the_old_weights_is_caught_by_name(
    config: Config, alone: Any, engines: Engines
) -> None:
    deaf = Pushes(config, alone, DeafEngines(engines))
    with (
        closing(deaf.canary),
        pytest.raises(EngineError, match="engine 0 does not use the weights that it was sent"),
    ):
        deaf.push(5)


def test_a_tensor_that_an_engine_has_kept_is_caught_by_name(pushes: Pushes, fault: Path) -> None:
    """The canary would notice that something is wrong, and not what. That SGLang keeps matrices as they come shows in
    the first push after it has joined.
    """
    pushes.push(6)
    fault.write_text("kept")
    with pytest.raises(EngineError, match=rf"engine 0, [\s\S]*\"{KEPT}: the engine has loaded the push, and has other"):
        pushes.push(7)
    fault.write_text("")


def test_a_flipped_bit_in_a_bucket_is_caught_by_name(pushes: Pushes, monkeypatch: pytest.MonkeyPatch) -> None:
    put = buckets.put

    def flipping(tensor: torch.Tensor, flat: torch.Tensor, start: int) -> torch.Tensor:
        place = put(tensor, flat, start)
        flat[start] ^= 1
        return place

    monkeypatch.setattr(broadcast, "put", flipping)
    with pytest.raises(EngineError, match=r"engine 0, [\s\S]*weight has arrived with other bytes than were sent"):
        pushes.push(8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda weights: weights[:-1], f"a push has left out {{last}}; the model has {TENSORS} tensors"),
        (lambda weights: [*weights, weights[0]], "a push brings {first} twice"),
    ],
    ids=["left out", "twice"],
)
def test_what_the_sender_does_not_notice_the_engine_does(
    pushes: Pushes, change: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = list(pushes.checkpoint.export(pushes.actor.chunks))
    monkeypatch.setattr(Tally, "count", lambda self, indices: None)
    monkeypatch.setattr(Tally, "end", lambda self: None)
    expected = says.format(first=weights[0][0], last=weights[-1][0])
    with pytest.raises(EngineError, match=rf"engine 0, [\s\S]*{expected}"):
        pushes.publisher.push(change(weights), version=9)


def test_after_all_of_that_a_push_that_is_whole_passes(pushes: Pushes) -> None:
    assert pushes.push(10)["verify/canary_max"].value <= 2e-5

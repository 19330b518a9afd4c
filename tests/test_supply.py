"""What becomes of a push that fails: the engines are replaced, or the run stops, or ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from dapo_megatron.errors import EngineError, StorageError, WeightsError
from dapo_megatron.heartbeat import Peers
from dapo_megatron.stop import Stop, StopRequested
from dapo_megatron.supply import Supply


@pytest.fixture
def stop() -> Iterator[Stop]:
    before = signal.getsignal(signal.SIGURG)
    yield Stop()
    signal.signal(signal.SIGURG, before)


class Ranks(Peers):
    """Notes what the leader has come to."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def leader_says(self, what: str, value: Any = None) -> Any:
        self.said.append(what)
        return value


class Scene:
    """A leader whose pushes raise what is given."""

    def __init__(self, stop: Stop, *errors: EngineError | None) -> None:
        self.errors, self.failed, self.peers = list(errors), list[EngineError](), Ranks()
        publisher: Any = SimpleNamespace(push=self._push)
        actor: Any = SimpleNamespace(chunks=[], leave=lambda *_, **__: None, come_back=lambda *_, **__: None)
        hf: Any = SimpleNamespace(gathers=False)
        self.engines: Any = SimpleNamespace(expect=lambda version: None, recover=self.failed.append, refill=None)
        self.supply = Supply(publisher, actor, hf, self.peers, self.engines, stop)

    def _push(self, weights: object, version: int) -> Any:
        if error := self.errors.pop(0):
            raise error
        return {"pushed": version}


def test_where_weights_cannot_be_written_the_run_is_to_save_and_to_stop(
    stop: Stop, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene(stop, StorageError("cannot write the weights: full"))
    assert scene.supply.push(3) == {}
    assert scene.peers.said == ["publish"], "the others go on with the leader"
    assert (stop.reason, stop.exit_code) == ("error: cannot write the weights: full", 1)
    assert not scene.failed, "no engine is at fault"
    assert "cannot write the weights: full; the run saves what is done and ends" in caplog.text


def test_in_a_rollout_too(stop: Stop) -> None:
    scene = Scene(stop, None, StorageError("full"))
    scene.supply.push(3)
    with pytest.raises(StopRequested), scene.supply.on_demand(stop), stop.interruptible():
        scene.engines.refill()
        pytest.fail("the rollout is thrown away")
    assert scene.peers.said == ["publish", "weights on demand", "publish"]
    assert stop.reason == "error: full"


def test_before_the_first_step_there_is_nothing_to_save(stop: Stop) -> None:
    scene = Scene(stop, StorageError("full"))
    with pytest.raises(StopRequested), stop.interruptible():
        scene.supply.push(0)
    assert stop.words == "error: full: nothing was saved; there is no checkpoint"


def test_other_failures_are_the_engines(stop: Stop) -> None:
    scene = Scene(stop, EngineError("died"))
    assert scene.supply.push(3) == {}
    assert [str(error) for error in scene.failed] == ["died"] and stop.reason is None


def test_where_an_engine_cannot_be_ended_what_is_done_is_saved(stop: Stop) -> None:
    scene = Scene(stop, EngineError("died"))

    def recover(error: EngineError) -> None:
        raise EngineError("engine 1 did not end within 10 s")

    scene.engines.recover = recover
    assert scene.supply.push(3) == {}
    assert scene.peers.said == ["publish"], "the others are not left waiting"
    assert stop.reason == "error: engine 1 did not end within 10 s"


def test_a_push_that_is_made_again_is_measured_in_place_of_the_one_that_broke_off(stop: Stop) -> None:
    scene = Scene(stop, EngineError("died"), None)
    with scene.supply.sampling(3) as verified:
        assert verified == {}
        with scene.supply.on_demand(stop):
            scene.engines.refill()
    assert verified == {"pushed": 3}


def test_with_other_weights_nothing_is_sampled_and_what_is_done_is_saved(stop: Stop) -> None:
    scene = Scene(stop, WeightsError("engine 1 has others"))
    assert scene.supply.push(3) == {} and not scene.failed
    assert scene.peers.said == ["publish"], "the others are not left waiting"
    with pytest.raises(StopRequested), stop.interruptible():
        pytest.fail("nothing is sampled")
    assert stop.reason == "error: engine 1 has others"


class Sleepy:
    """Engines of which one does not go to sleep as it should."""

    def __init__(self, stop: Stop, *, fails: bool) -> None:
        self._stop, self._fails = stop, fails
        self.waited: list[bool] = []

    def sleep(self, *, wait: bool = True) -> None:
        self.waited.append(wait)
        if self._fails:
            raise EngineError("engine 0 did not end")
        if wait:
            self._stop.ask("SIGUSR1")  # while it waits for one that starts
            pytest.fail("a stop is heard at once")

    def wake(self, *tags: str) -> None: ...
    def expect(self, version: int) -> None: ...


@pytest.mark.parametrize(
    ("fails", "waited", "reason"), [(False, [True, False], "SIGUSR1"), (True, [True], "error: engine 0 did not end")]
)
def test_whatever_becomes_of_engines_that_go_to_sleep_the_others_are_told_and_the_actor_is_back_to_be_saved(
    stop: Stop, fails: bool, waited: list[bool], reason: str
) -> None:
    told: list[str] = []

    class Told(Peers):
        def leader_says(self, what: str, value: Any = None) -> Any:
            told.append(what)
            return value

        def together(self, what: str) -> None: ...

    actor: Any = SimpleNamespace(leave=lambda *_, **__: None, come_back=lambda *_: told.append("back"), chunks=[])
    publisher: Any = SimpleNamespace(push=lambda *_: {})
    hf: Any = SimpleNamespace(gathers=False)
    engines: Any = Sleepy(stop, fails=fails)
    with Supply(publisher, actor, hf, Told(), engines, stop, in_turns=True).sampling(7):
        pass
    assert told[-2:] == ["engines that sleep", "back"]
    assert (engines.waited, stop.reason) == (waited, reason)

"""What lies on a card that actor and engine take turns with, step by step, with stand-ins that keep accounts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dapo_megatron import config_file, train
from dapo_megatron.canary import Canary
from dapo_megatron.errors import EngineError
from dapo_megatron.heartbeat import Peers
from dapo_megatron.measures import Measures
from dapo_megatron.obs.observer import NullObserver
from dapo_megatron.rollout.engine import KV_CACHE, WEIGHTS
from dapo_megatron.state import Kept
from dapo_megatron.stop import Stop
from dapo_megatron.supply import Supply
from tests.helpers.checkpoint import values

SIZES = {"parameters": 4, "optimizer": 6, "gradients": 8, "activations": 9, WEIGHTS: 4, KV_CACHE: 20}
"""GiB."""
TRAINING = 4 + 6 + 8 + 9
SAMPLING = 4 + 20
ACTOR = ("parameters", "optimizer", "gradients")


class Card:
    """Keeps account of what lies on it, and of what happens."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.happened: list[str] = []
        self.most = 0

    def take(self, *names: str) -> None:
        self.held |= set(names)
        self.most = max(self.most, sum(SIZES[name] for name in self.held))

    def needs(self, *names: str) -> None:
        assert self.held >= set(names), f"{names} wanted, there are {self.held}"


class StandInActor:
    def __init__(self, card: Card) -> None:
        self.card, self.chunks = card, []
        card.take(*ACTOR)

    def leave(self, phase: Any = None, *, keeping: Collection[str] = ()) -> None:
        leaving = set(ACTOR) - set(keeping)
        if self.card.held & leaving:
            self.card.happened.append(f"actor gives up {', '.join(sorted(self.card.held & leaving))}")
        self.card.held -= leaving

    def come_back(self, phase: Any = None, *, only: Collection[str] = ACTOR) -> None:
        self.card.happened.append(f"actor takes {', '.join(sorted(set(only)))}")
        self.card.take(*only)

    def with_old_logprobs(self, mini_batches: Any) -> tuple[Any, Measures]:
        self.card.needs("parameters")
        return mini_batches, {}

    def update(self, *_: Any, **__: Any) -> None:
        self.card.needs(*ACTOR)
        self.card.take("activations")
        self.card.held.discard("activations")
        self.card.happened.append("update")


class StandInEngines:
    """One engine, which starts with all of its memory, and can be started again."""

    refill: Callable[[], None] | None = None

    def __init__(self, card: Card) -> None:
        self.card = card

    def sleep(self, *, wait: bool = True) -> None:
        self.card.held -= {WEIGHTS, KV_CACHE}
        self.card.happened.append("engines sleep")

    def wake(self, *tags: str) -> None:
        if new := set(tags) - self.card.held:
            self.card.happened.append(f"engines take {', '.join(sorted(new))}")
        self.card.take(*tags)

    def sample(self, what: str) -> None:
        self.card.needs(WEIGHTS, KV_CACHE)
        self.card.happened.append(what)

    def start_again(self) -> None:
        self.card.take(WEIGHTS, KV_CACHE)
        self.card.happened.append("engine started again")
        assert self.refill
        self.refill()

    def expect(self, version: int) -> None: ...

    def recover(self, error: EngineError) -> None:
        raise error

    def ask(self, question: Callable[[Any], Any]) -> list[Any]:
        return []

    def __iter__(self) -> Iterator[Any]:
        return iter([self])


class StandInPublisher:
    def __init__(self, card: Card) -> None:
        self.card = card

    def push(self, weights: Any, version: int) -> Measures:
        self.card.needs("parameters", WEIGHTS)
        self.card.happened.append(f"push {version}")
        return {}

    def close(self) -> None: ...


class AskingCanary(Canary):
    """Has the engine answer and the actor score, as far as memory is concerned."""

    def _ask(self, leader: Any, *_: Any, **__: Any) -> Any:
        leader.engines.sample("canary")

    def _apart(self, prompt: Any, version: int, failure: EngineError | None = None) -> None:
        self._ask(self._leader)
        self._actor.with_old_logprobs([])


@pytest.fixture
def card() -> Card:
    return Card()


def run(
    card: Card,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    rollout: Callable[[StandInEngines], bool] = lambda engines: True,
    **engine: Any,
) -> list[str]:
    """Train for two steps. Returns what happened.

    Args:
        rollout: whether it is whole.
    """
    config = config_file.parse(values(folder) | {"engine": engine, "train": {"steps": 2, "mini_batch": 4}})
    engines = StandInEngines(card)
    if config.engine.sleeps:
        engines.sleep()
    else:
        engines.wake(WEIGHTS, KV_CACHE)
    actor: Any = StandInActor(card)
    card.happened.clear()

    def batch(*_: Any) -> Any:
        engines.sample("rollout")
        return object() if rollout(engines) else None

    leader: Any = SimpleNamespace(
        config=config,
        engines=engines,
        evaluate_due=lambda step, stop: engines.sample("evaluation"),
        finish=lambda stop: engines.sample("last evaluation"),
        log=lambda *_: None,
        close=lambda: None,
    )

    def save(*_: Any, **__: Any) -> None:
        card.needs(*ACTOR)
        card.happened.append("checkpoint")

    checkpoints: Any = SimpleNamespace(
        point_to_best=lambda: None, last="", due=lambda step: True, save=save, news=lambda: None, finish=lambda: None
    )
    publisher: Any = StandInPublisher(card)
    if config.weights.verify == "full":
        publisher = AskingCanary.__new__(AskingCanary)
        publisher.__dict__.update(
            _publisher=StandInPublisher(card), _config=config, _leader=leader, _actor=actor, _prompt=None, _tokens=1
        )
    hf: Any = SimpleNamespace(save=lambda *_: None, gathers=False)
    stop = Stop()
    supply = Supply(publisher, actor, hf, Peers(), engines, stop, in_turns=config.engine.sleeps)  # pyright: ignore[reportArgumentType]
    skipped: Any = SimpleNamespace(seen=lambda *_: None)
    parts = train.Parts(leader, actor, None, hf, supply, checkpoints, skipped, Kept(int, 0))
    monkeypatch.setattr(train, "start", lambda *_: parts)
    monkeypatch.setattr(train, "make_batch", batch)
    monkeypatch.setattr(train, "receive", lambda *_: ["a mini-batch"])
    monkeypatch.setattr(train, "weigh", lambda mini_batches, *_: (mini_batches, {}))
    topo: Any = SimpleNamespace(dp=1, max=None)
    with ExitStack() as opened:
        train.train(config, topo, Peers(), NullObserver(), None, opened, stop)
    return card.happened


HAND_OVER = ["actor gives up gradients, optimizer", "engines take weights"]
STEP = [
    "evaluation",
    "rollout",
    "engines sleep",
    "actor takes gradients, optimizer, parameters",
    "update",
    "checkpoint",
]


def test_neither_has_all_of_its_memory_while_the_other_has(
    card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_file, "parse", _without_canary(config_file.parse))
    happened = run(card, tmp_path, monkeypatch, placement="colocated")
    last = ["actor gives up parameters", "engines take kv_cache"]
    assert happened == [
        *(*HAND_OVER, "push 0", *last, *STEP),
        *(*HAND_OVER, "push 1", *last, *STEP),
        "checkpoint",
        *(*HAND_OVER, "push 2", *last, "last evaluation"),
    ]
    assert card.most == max(TRAINING, SAMPLING)


def test_the_canary_needs_the_cache_beside_the_parameters_and_nothing_else(
    card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened = run(card, tmp_path, monkeypatch, placement="colocated")
    checked = ["engines take kv_cache", "canary", "actor gives up parameters"]
    assert happened[:12] == [*HAND_OVER, "push 0", *checked, *STEP]
    assert card.most == SAMPLING + SIZES["parameters"]


def test_an_engine_that_was_started_again_gets_its_weights_in_turns_as_well(
    card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_file, "parse", _without_canary(config_file.parse))
    again = iter([True, False])

    def rollout(engines: StandInEngines) -> bool:
        if next(again):
            engines.start_again()
            engines.sample("rest of the rollout")
        return True

    happened = run(card, tmp_path, monkeypatch, rollout, placement="colocated")
    at = happened.index("engine started again")
    assert happened[at : at + 8] == [
        "engine started again",
        "engines sleep",
        "actor takes parameters",
        "engines take weights",
        "push 0",
        "actor gives up parameters",
        "engines take kv_cache",
        "rest of the rollout",
    ]
    assert card.most == max(TRAINING, SAMPLING)


def test_where_a_rollout_is_thrown_away_the_actor_comes_back_to_be_saved(
    card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = iter([True, False])
    happened = run(card, tmp_path, monkeypatch, lambda engines: next(whole), placement="colocated")
    assert happened[-4:] == [
        "rollout",
        "engines sleep",
        "actor takes gradients, optimizer, parameters",
        "checkpoint",
    ]


@pytest.mark.parametrize("engine", [{}, {"placement": "colocated", "sleep": False}])
def test_engines_with_a_share_of_their_own_keep_it(
    card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: dict[str, Any]
) -> None:
    happened = run(card, tmp_path, monkeypatch, **engine)
    assert not [what for what in happened if what.startswith("engines")]
    assert [what for what in happened if what.startswith("push")] == ["push 0", "push 1", "push 2"]


def test_nobody_takes_memory_before_all_ranks_have_given_it_up() -> None:
    told: list[str] = []

    class Told(Peers):
        def leader_says(self, what: str, value: Any = None) -> Any:
            told.append(what)
            return value

        def together(self, what: str) -> None:
            told.append(what)

    def noting(what: str) -> Any:
        return lambda *_, **__: told.append(what)

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        told.append(f"[{name}")
        yield
        told.append("]")

    actor: Any = SimpleNamespace(leave=noting("leave"), come_back=noting("come back"), chunks=[])
    engines: Any = SimpleNamespace(sleep=noting("sleep"), wake=noting("wake"), expect=noting("expect"))
    hf: Any = SimpleNamespace(gathers=False)
    publisher: Any = SimpleNamespace(push=lambda *_: noting("push")() or {})
    for there in (engines, None):  # the leader, and any other rank
        told.clear()
        with Supply(publisher, actor, hf, Told(), there, Stop(), in_turns=True, phase=phase).sampling(7):
            told.append("sampling")
        leader_only = {"sleep", "wake", "expect"}
        expected = [
            *("leave", "[wake", "memory for the engines", "wake", "engines that wake", "]"),
            *("[publish", "expect", "push", "publish", "]"),
            *("leave", "[wake", "memory for the engines", "wake", "engines that wake", "]"),
            "sampling",
            *("[sleep", "sleep", "engines that sleep", "]", "come back"),
        ]
        assert told == [what for what in expected if there or what not in leader_only]


def _without_canary(parse: Callable[..., Any]) -> Callable[..., Any]:
    return lambda given: parse(given | {"weights": {"verify": "checksums"}})

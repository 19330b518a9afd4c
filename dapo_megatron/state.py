"""Keeps what has to survive a restart, in plain values that JSON holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, Protocol, TypeVar

from pydantic import TypeAdapter

from dapo_megatron.errors import DapoError

T = TypeVar("T")


class Stateful(Protocol):
    """A part of a run that can go on where it stood."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain values: numbers, text, lists and dicts with text as keys."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on where the part that gave `state` stood."""
        ...


class Kept(Generic[T]):
    """A value that survives a restart.

    >>> done = Kept(int, 0)
    >>> done.value += 1
    >>> done.state_dict()
    {'value': 1}

    Args:
        kind: the type of the value, which may be built of the frozen dataclasses of this package.
        value: the one to begin with.
    """

    def __init__(self, kind: Any, value: T) -> None:
        self._adapter: TypeAdapter[T] = TypeAdapter(kind)
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self._adapter.dump_python(self.value, mode="json")}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self.value = self._adapter.validate_python(state["value"])


class RunState:
    """All parts of a run that survive a restart, besides the actor and its optimizer.

    What the leader saves, every rank can load: it takes the parts that all ranks keep, and the leader its own as well.

    Args:
        leader: on the leader, the parts that only it keeps; None on other ranks.
        shared: the parts that are alike on all ranks.

    Raises:
        DapoError: from `load_state_dict`, where a state of other parts is given.
    """

    def __init__(self, leader: Mapping[str, Stateful] | None, **shared: Stateful) -> None:
        self.steps_done = Kept(int, 0)
        """Also the version of the weights that the engines have."""
        self._parts = {"shared": {"steps_done": self.steps_done, **shared}}
        if leader is not None:
            self._parts["leader"] = dict(leader)

    def state_dict(self) -> dict[str, Any]:
        return {
            owner: {name: part.state_dict() for name, part in parts.items()} for owner, parts in self._parts.items()
        }

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        for owner, parts in self._parts.items():
            saved = state.get(owner, {})
            if saved.keys() != parts.keys():
                raise DapoError(
                    f"the saved state has {', '.join(sorted(saved)) or 'nothing'} for {owner}; this run keeps "
                    f"{', '.join(sorted(parts))}"
                )
            for name, part in parts.items():
                part.load_state_dict(saved[name])

"""Keeps what has to survive a restart, in plain values that JSON holds."""

from __future__ import annotations

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
    """All parts of a run that survive a restart, besides the actor.

    Args:
        parts: the parts that this rank has, by name.

    Raises:
        DapoError: from `load_state_dict`, where a state of other parts is given.
    """

    def __init__(self, **parts: Stateful) -> None:
        self.steps_done = Kept(int, 0)
        self._parts: dict[str, Stateful] = {"steps_done": self.steps_done, **parts}

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        if state.keys() != self._parts.keys():
            raise DapoError(
                f"the saved state is one of {', '.join(sorted(state))}; this run keeps {', '.join(sorted(self._parts))}"
            )
        for name, part in self._parts.items():
            part.load_state_dict(state[name])

"""Callbacks that do not keep alive what they are of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakMethod


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a bound method without a hold on its object, for Megatron's config.

    The config hangs on hooks of autograd, whose references Python's garbage collector does not follow all the way. What
    it holds would stay for ever: models, process groups, and the threads of those, which wake up 100 times a second.
    """
    weak, name = WeakMethod(method), method.__qualname__

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = weak()
        assert bound is not None, f"{name} is called after its object is gone"
        return bound(*args, **kwargs)

    return call

"""What would keep a model alive when nobody holds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

from torch import Tensor
from torch.nn import Module


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


def forget_graph(model: Module) -> None:
    """Drop what the dispatchers of Megatron's experts keep of the last micro-batch: it holds on to its whole graph, and
    that to the hooks of all parameters, past Python's garbage collector.
    """
    dispatchers = [module.token_dispatcher for module in model.modules() if hasattr(module, "token_dispatcher")]
    for dispatcher in dispatchers:
        kept = [name for name, value in vars(dispatcher).items() if isinstance(value, Tensor) and value.grad_fn]
        for name in kept:
            setattr(dispatcher, name, None)

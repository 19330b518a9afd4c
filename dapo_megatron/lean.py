"""Has Megatron imported in half the time on a CPU, for every rank and every conversion pays for it.

On its way Megatron imports TorchDynamo and Inductor, because it decorates its fused kernels with `torch.compile`, and
wandb, because its inference server can log to it. A model on a CPU calls none of these.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MEGATRON = "megatron.core"


def install() -> None:
    """Stand by for the first import of Megatron, whoever asks for it."""
    if _MEGATRON not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MEGATRON:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                with _lean():
                    execute(module)

            spec.loader.exec_module = exec_module
        return spec


@contextmanager
def _lean() -> Iterator[None]:
    import torch

    if torch.cuda.is_available():
        yield
        return
    compile_, torch.compile = torch.compile, partial(_compiled_when_called, torch.compile)
    absent = "wandb" not in sys.modules
    if absent:
        sys.modules["wandb"] = None  # pyright: ignore[reportArgumentType]  # importing it fails
    try:
        yield
    finally:
        torch.compile = compile_
        if absent:
            del sys.modules["wandb"]


def _compiled_when_called(
    compile_: Callable[..., Any], function: Callable[..., Any] | None = None, /, **options: Any
) -> Callable[..., Any]:
    """`torch.compile` of a function, put off to its first call."""
    if function is None:
        return partial(_compiled_when_called, compile_, **options)
    compiled: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        import torch

        if torch.compiler.is_compiling():  # one such function calls another
            return function(*args, **kwargs)
        if not compiled:
            compiled.append(compile_(function, **options))
        return compiled[0](*args, **kwargs)

    return call

"""Finds parts that a configuration names: a module of ours by its name, or anybody's as `some.module:NAME`."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType
from typing import Any


def known(home: str) -> list[str]:
    """Return the names of the modules in the package `home`."""
    package: ModuleType = import_module(home)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def find(value: str, home: str, attribute: str, kind: type) -> Any:
    """Return `attribute` of the module `value` of the package `home`, or for `some.module:NAME` that module's NAME.

    Raises:
        ValueError: where there is none, or it is no `kind`.
    """
    module, colon, name = value.partition(":")
    if not colon and value not in known(home):
        raise ValueError(f"{value!r} is not known; known are {', '.join(known(home))}, or some.module:NAME for another")
    try:
        found = getattr(import_module(module if colon else f"{home}.{value}"), name if colon else attribute)
    except Exception as error:  # somebody's module runs, and may raise anything
        raise ValueError(f"{value!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(found, kind):
        expected = "class" if kind is type else f"{kind.__module__}.{kind.__qualname__}"
        raise ValueError(f"{value!r} is {found!r}; expected a {expected}")
    return found

"""Examples in docstrings run, and none of them is left out."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import dapo_megatron

PACKAGE = Path(dapo_megatron.__file__).parent
WITH_EXAMPLES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text()]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path: Path) -> None:
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    failed, tried = doctest.testmod(import_module(name.removesuffix(".__init__")))
    assert tried and not failed
    assert "doctest: +SKIP" not in path.read_text()

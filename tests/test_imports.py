"""Who may import whom (docs/architecture.md, "Rooms"), imports inside functions included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import dapo_megatron

PACKAGE = Path(dapo_megatron.__file__).parent
NAME = PACKAGE.name
VOCABULARY = {"types", "measures", "config", "errors", "hf_folder", "state", "units", "disk", "routes"}
HEAVY = {"megatron", "mbridge", "vllm", "sglang", "torch.distributed", "ray"}

ROOMS: dict[str, set[str]] = {
    "types": {"measures"},
    "measures": set(),
    "config": {"errors", "algo.loss"},
    "errors": set(),
    "hf_folder": {"errors"},
    "state": {"errors"},
    "units": set(),
    "routes": set(),
    "disk": set(),
    "lean": set(),
    "mkl": set(),
    "processes": set(),
    "signals": set(),
    "stop": set(),
    "launch": {"config", "errors"},
    "heartbeat": {"errors"},
    "config_file": VOCABULARY,
    "algo": VOCABULARY,
    "data": VOCABULARY,
    "pack": VOCABULARY,
    "reward": VOCABULARY,
    "obs": {*VOCABULARY, "config_file"},
    "rollout": {*VOCABULARY, "processes"},
    "actor": {*VOCABULARY, "mkl"},
    "weights": {*VOCABULARY, "mkl"},
    "checkpoint": {*VOCABULARY, "convert.dist_files"},
    "eval": {*VOCABULARY, "rollout.collect", "rollout.engine"},
    "prepare": {
        *(*VOCABULARY, "checkpoint.folder", "cli", "config_file", "convert.main", "convert.output", "data"),
        *("obs.terminal", "signals"),
    },
    "preflight": {
        *(*VOCABULARY, "actor.architecture", "checkpoint.folder", "data", "obs.lock", "obs.run_folder", "obs.sinks"),
        *("reward.format", "reward.math", "rollout", "weights.version_folders"),
    },
}
"""Room -> modules of this package that it may import besides its own. Other rooms may import everything."""

ALLOWED_HEAVY: dict[str, set[str]] = {
    "actor": {"megatron", "torch.distributed"},
    "weights": {"megatron", "mbridge", "torch.distributed"},
    "checkpoint": {"megatron", "torch.distributed"},
    "checkpoint.folder": set(),
    "rollout.endpoints": {"vllm", "sglang"},
    "weights.workers": {"vllm", "sglang", "torch.distributed"},
    "check_reduction": {"torch.distributed"},
    "check_reduction.forked": {"mbridge"},
    "convert": {"megatron", "mbridge", "torch.distributed"},
    "cli": {"torch.distributed"},
}
"""Module or room -> heavy libraries that it may import. The longest name that fits counts; others may import none."""

MODULES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    """`dapo_megatron/algo/loss.py` -> `algo.loss`; a package is its folder's name."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__").replace("__init__", "")


def imports(tree: ast.AST, module: str) -> Iterator[str]:
    """Every name that an import statement may bring in: `from a import b` gives a.b, which may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.")


def violations(source: str, module: str) -> list[str]:
    room = module.split(".")[0]
    longest = max((place for place in ALLOWED_HEAVY if within(module, place)), key=len, default="")
    heavy_here = ALLOWED_HEAVY.get(longest, set())
    found = []
    for name in imports(ast.parse(source), module):
        if within(name, NAME):
            inner = name.removeprefix(NAME).removeprefix(".")
            allowed = {*ROOMS.get(room, set()), room, "__version__"}
            ok = room not in ROOMS or not inner or any(within(inner, place) for place in allowed)
        else:
            ok = not any(within(name, library) and library not in heavy_here for library in HEAVY)
        if not ok:
            found.append(f"{module} imports {name}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=[module_name(path) or NAME for path in MODULES])
def test_imports_keep_to_the_rooms(path: Path) -> None:
    assert violations(path.read_text(), module_name(path)) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("algo.loss", "import megatron.core"),
        ("algo.loss", "def f():\n    from torch import distributed"),
        ("pack.bins", "import torch.distributed as dist"),
        ("rollout.adapters.vllm", "import vllm"),
        ("rollout.endpoints.vllm", "from dapo_megatron.weights.buckets import flatten"),
        ("rollout.adapters.vllm", "from dapo_megatron.weights.group import Group"),
        ("weights.group", "from vllm import LLM"),
        ("actor.actor", "from dapo_megatron.rollout import engine"),
        ("actor.actor", "import mbridge"),
        ("data.stream", "from dapo_megatron import train"),
        ("obs.observer", "from dapo_megatron.eval.evaluate import EvalResult"),
        ("leader", "from megatron.core import parallel_state"),
    ],
)
def test_a_violation_is_seen(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


def test_every_room_has_a_rule() -> None:
    composers = {
        *(
            "",
            "__main__",
            "canary",
            "check_reduction",
            "cli",
            "convert",
            "eval_command",
            "leader",
            "rank",
            "responses",
            "serve",
            "skipped",
            "supply",
        ),
        "train",
    }
    rooms = {module_name(path).split(".")[0] for path in MODULES}
    assert rooms - composers == set(ROOMS)

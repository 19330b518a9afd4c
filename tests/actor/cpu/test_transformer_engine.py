"""A machine without a GPU where Transformer Engine's package is installed: nothing of it may be called."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.models import save_qwen2

PACKAGE = '''
import contextlib, importlib, importlib.abc, importlib.machinery, sys, types
import torch

__version__ = "2.11.0"
__path__ = []


class Names(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Names(name, (Module,), {"__module__": cls.__module__})


class Module(torch.nn.Module, metaclass=Names):
    """Whatever is asked for; it may be inherited from, not used."""
    def __init__(self, *args, **kwargs):
        raise RuntimeError(f"CUDA error: {type(self).__name__} was called")


class Anything(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, Names(name, (Module,), {"__module__": self.__name__}))
        return getattr(self, name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.startswith(__name__ + "."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Anything(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, Finder())
import transformer_engine.pytorch as pytorch
import transformer_engine.common.recipe, transformer_engine.pytorch.cpu_offload, transformer_engine.pytorch.attention

# What Megatron calls in any case, and torch's functions are enough for: without offloading, and to split.
pytorch.cpu_offload.get_cpu_offload_context = lambda *args, **kwargs: (contextlib.nullcontext(), lambda x: x)
pytorch.attention._SplitAlongDim.apply = lambda x, dim, sizes: x.split(sizes, dim)
'''

UPDATE = """
import sys
from pathlib import Path

from dapo_megatron.actor import topology
from dapo_megatron.actor.actor import Actor
from dapo_megatron.weights.hf import HfCheckpoint
from tests.helpers.batches import make_micro_batch, make_mini_batch, ratio_loss
from tests.helpers.models import make_config

config = make_config(Path(sys.argv[1]), model={"dtype": "bfloat16"})
actor = Actor(config, topology.initialize(config.parallel), HfCheckpoint(config.model.path))
mini_batches, _ = actor.with_old_logprobs([make_mini_batch([make_micro_batch([5, 13, 9], seed=1)])])
result = actor.update(*mini_batches, ratio_loss, lr=1e-3)

from megatron.core.optimizer import clip_grads

print(hasattr(clip_grads, "multi_tensor_l2norm"), result["grad_norm"], result["update_ratio/mlp"], result.skipped)
"""


def update(model_path: Path, *folders: Path) -> list[str]:
    """Makes an update in a process that finds packages in these folders too. Returns whether Megatron took a kernel of
    Transformer Engine, and what the update measured."""
    path = os.pathsep.join(map(str, [*folders, Path(__file__).parents[3]]))
    command = [sys.executable, "-c", UPDATE, str(model_path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr
    return done.stdout.split()


def test_an_update_is_the_same_as_without_the_package(tmp_path: Path) -> None:
    model_path = save_qwen2(tmp_path / "model")
    package = tmp_path / "packages" / "transformer_engine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PACKAGE)
    found, *got = update(model_path, package.parent)
    missing, *want = update(model_path)
    assert (found, missing) == ("True", "False")
    assert got == want and got[-1] == "None"

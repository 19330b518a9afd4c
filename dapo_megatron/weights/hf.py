"""Hugging Face checkpoints in and out of Megatron models, on mbridge's name mapping and tensor-parallel splits."""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dapo_megatron import disk
from dapo_megatron.errors import ConfigError, DapoError
from dapo_megatron.hf_folder import read_hf_config, tensor_files
from dapo_megatron.weights.bridge import make_bridge
from dapo_megatron.weights.buckets import Named, buckets, only_sizes
from dapo_megatron.weights.publish import AfterLeader
from dapo_megatron.weights.read import fill, held, is_expert, share
from dapo_megatron.weights.shards import write_tensors
from dapo_megatron.weights.side_files import copy_side_files, declare_tokenizer
from dapo_megatron.weights.verify import Inventory

_SHARD_BYTES = 4 << 30


class HfCheckpoint:
    """A folder with config.json and *.safetensors, and the models it fits.

    Needs Megatron's process groups. `load`, `export` and `save` are collective.

    Args:
        gathers_everywhere: whether every replica gathers its weights for engines, not only one for the leader.

    Raises:
        ConfigError: where the folder holds no such checkpoint or mbridge does not know the architecture.
    """

    def __init__(self, path: Path, *, trust_remote_code: bool = False, gathers_everywhere: bool = False) -> None:
        self.path, self._gathers_everywhere = path, gathers_everywhere
        self.hf_config: Any = read_hf_config(path, trust_remote_code=trust_remote_code)
        self._bridge = make_bridge(self.hf_config)
        self.inventory: Inventory | None = None
        """What `export` has to give, once rank 0 has loaded a model; None on other ranks."""

    def load(self, chunks: Sequence[torch.nn.Module], together: Callable[[str], object] = lambda what: None) -> None:
        """Fill this rank's GPTModels, converted to their dtype.

        The ranks of one replica read, each its own part and without the others. From them, the other replicas get it.
        With expert parallel, those that have the replica's other experts read these.

        Args:
            together: called on every rank between the two; returns when all have come there, however long one reads.

        Raises:
            ConfigError: on ranks that read, where the checkpoint lacks a tensor of the model, or has one that the model
                has no place for, or that has another shape.
        """
        self._bridge.dtype = next(chunks[0].parameters()).dtype
        replicas: Any = mpu.get_data_parallel_group(with_context_parallel=True)
        of_experts: Any = mpu.get_expert_data_parallel_group()
        if of_experts.rank() == 0:
            files = self._checked(chunks)
            fill(self._bridge, chunks, files, is_expert if replicas.rank() else lambda name: True)
            if dist.get_rank() == 0:
                self.inventory = _inventory(files, self._bridge.dtype)
        together("weights read")
        params = list(held(self._bridge, chunks))
        share([param for name, _, param in params if not is_expert(name)], replicas)
        share([param for name, _, param in params if is_expert(name)], of_experts)

    def export(self, chunks: Sequence[torch.nn.Module]) -> Iterable[tuple[str, Tensor]]:
        """Every tensor of the model under its Hugging Face name, whole, on every rank of the replica.

        Iterating is collective over these, and goes to the end; each time is another gathering. Tensors may share
        memory with live parameters: copy what must outlast the next optimizer step. A tied model gives no
        lm_head.weight.
        """
        return _Export(self._bridge, list(chunks))

    @property
    def gathers(self) -> bool:
        """Whether this rank takes part where weights are gathered for engines: those of the leader's replica do.

        Experts that ranks share out have ranks of other replicas in their groups: then all do.
        """
        if self._gathers_everywhere:
            return True
        replicas: Any = mpu.get_data_parallel_group(with_context_parallel=True)
        return replicas.rank() == 0 or mpu.get_expert_model_parallel_world_size() > 1

    def save(
        self, chunks: Sequence[torch.nn.Module], folder: Path, after_leader: AfterLeader = lambda what: None
    ) -> None:
        """Write a checkpoint that `AutoModelForCausalLM` reloads bit for bit, and `AutoTokenizer` id for id.

        Rank 0 writes. The folder gets its name once all is on the disk, in the place of one that is there.

        Args:
            after_leader: called on every rank before the weights of a shard are gathered; the leader may still be
                writing the one before.

        Raises:
            DapoError: where it cannot, for example because the disk is full.
        """
        weights = self.export(chunks)

        def shards(weights: Iterable[tuple[str, Tensor]]) -> Iterator[Named]:
            return buckets(weights, _SHARD_BYTES, lambda: after_leader("shard"))

        if dist.get_rank() != 0:
            deque(shards(only_sizes(weights)), maxlen=0)
            return
        # Copies: safetensors refuses tensors that share memory.
        copies = shards((name, tensor.to("cpu", copy=True).contiguous()) for name, tensor in weights)
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        try:
            if unfinished.exists():  # of a run that was cut short
                shutil.rmtree(unfinished)
            unfinished.mkdir(parents=True)
            write_tensors(copies, unfinished)
            self.copy_side_files(unfinished, next(chunks[0].parameters()).dtype)
            disk.sync(*unfinished.rglob("*"), unfinished)
            if folder.exists():
                shutil.rmtree(folder)
            unfinished.rename(folder)
            disk.sync(folder.parent)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            deque(copies, maxlen=0)  # the others gather to the end
            raise DapoError(f"cannot save the model in {folder}: {error}") from error

    def write_side_files(self, folder: Path) -> None:
        """Write what lies beside the weights, for those of the model that was loaded. Not collective.

        Raises:
            OSError: where it cannot be written.
        """
        self.copy_side_files(folder, self._bridge.dtype)

    def copy_side_files(self, folder: Path, dtype: torch.dtype) -> None:
        """Copy what lies beside the weights to a folder for weights of `dtype`. Not collective.

        Raises:
            OSError: where it cannot be written.
        """
        copy_side_files(self.path, folder)
        _write_config(self.path / "config.json", folder / "config.json", dtype)
        declare_tokenizer(folder)

    def _checked(self, chunks: Sequence[torch.nn.Module]) -> dict[str, Path]:
        """Return where every tensor is that the ranks which read want, if all are there. Collective over these."""
        mine = {source for _, sources, _ in held(self._bridge, chunks) for source in sources}
        readers: Any = mpu.get_expert_tensor_model_pipeline_parallel_group()
        parts: list[Any] = [None] * readers.size()
        # Before files are opened: storage may answer late.
        dist.all_gather_object(parts, mine, group=readers)
        wanted = set().union(*parts)
        files = tensor_files(self.path)
        there = set(files)
        # Copies that some exporters write although the model computes or ties them.
        spare = {name for name in there if name.endswith("rotary_emb.inv_freq")}
        if self.hf_config.tie_word_embeddings:
            spare.add("lm_head.weight")
        for problem, names in (("lacks", wanted - there), ("has no place in the model for", there - wanted - spare)):
            if names:
                fused = any(name.endswith(".experts.gate_up_proj") for name in there)
                advice = "; save it with transformers' save_pretrained, which gives each expert its own tensors"
                raise ConfigError(
                    f"model.path: the checkpoint in {self.path} {problem} {len(names)} tensors, such as "
                    f"{', '.join(sorted(names)[:3])}; it has {len(there)}, the model wants {len(wanted)}"
                    f"{advice if fused else ''}"
                )
        return {name: file for name, file in files.items() if name in wanted}


@dataclass(frozen=True)
class _Export:
    bridge: Any
    chunks: list[torch.nn.Module]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        seen: set[str] = set()
        weights = self.bridge.export_weights(self.chunks)
        while True:
            # Not around the yield: the consumer's code would run without gradients too.
            with torch.no_grad():
                item = next(weights, None)
            if item is None:
                return
            name, tensor = item
            # With pipeline stages, a tied embedding is there twice.
            if name not in seen:
                seen.add(name)
                yield name, tensor.detach()
            del item, tensor  # not to keep it while the next one is gathered


def _inventory(files: Mapping[str, Path], dtype: torch.dtype) -> Inventory:
    """What a model in `dtype` is made of that was read from these files."""
    shapes: dict[str, list[int]] = {}
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as opened:
            inside = [name for name, place in files.items() if place == file]
            shapes |= {name: list(opened.get_slice(name).get_shape()) for name in inside}
    return Inventory(list(files), [str(dtype).removeprefix("torch.")] * len(files), [shapes[name] for name in files])


def _write_config(source: Path, target: Path, dtype: torch.dtype) -> None:
    """config.json, saying the dtype that was written."""
    config = json.loads(source.read_text())
    name = str(dtype).removeprefix("torch.")
    for key in ("dtype", "torch_dtype"):
        if key in config or key == "dtype":
            config[key] = name
    target.write_text(json.dumps(config, indent=2) + "\n")

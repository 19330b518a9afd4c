"""How the weights of a Megatron model and the tensors of a Hugging Face checkpoint belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dapo_megatron.config import ParallelConfig
from dapo_megatron.convert.layout import Layout, Weight, megatron_layout
from dapo_megatron.convert.tensors_file import Spec
from dapo_megatron.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What weights may be kept as. Others are quantised forms, which have scales beside them."""

_QUANTISED = (
    *(".weight_scale_inv", ".weight_scale", ".input_scale", ".activation_scale"),  # FP8
    *(".qweight", ".qzeros", ".scales", ".g_idx"),  # GPTQ, AWQ
    *(".weight_packed", ".weight_zero_point"),  # compressed-tensors
    *(".absmax", ".quant_map", ".SCB"),  # bitsandbytes
)
"""How tensors of quantised weights are named. No model here has such names."""


class Model:
    """A model in both forms.

    Args:
        hf_config: as `hf_folder.read_hf_config` gives it.
        parallel: the mesh whose ranks write the Megatron form.

    Raises:
        ConfigError: where the architecture is not supported or does not split into this layout.
    """

    def __init__(self, hf_config: Any, parallel: ParallelConfig) -> None:
        from mbridge.core.parallel_states import ParallelStates

        from dapo_megatron.actor.architecture import check_layout
        from dapo_megatron.weights.bridge import make_bridge

        check_layout(hf_config, parallel)
        self.hf_config = hf_config
        self.layout: Layout = megatron_layout(hf_config, parallel)
        self._bridge = make_bridge(hf_config, ParallelStates())
        self._bridge.dtype = None  # it is not to cast
        self._shapes = {weight: self._hf_shapes(weight) for weight in self.layout.weights}

    def _hf_shapes(self, weight: Weight) -> dict[str, tuple[int, ...]]:
        named = self.to_hf(weight, torch.empty(weight.shape, device="meta"))
        return {name: tuple(tensor.shape) for name, tensor in named.items()}

    def names(self, weight: Weight) -> list[str]:
        """Return the names of the Hugging Face tensors that this weight is made of."""
        return list(self._shapes[weight])

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of all Hugging Face tensors, in the order of the model."""
        return {name: shape for shapes in self._shapes.values() for name, shape in shapes.items()}

    def to_megatron(self, weight: Weight, tensors: Sequence[Tensor]) -> Tensor:
        """Put a weight together from the tensors of its `names`. Rows that pad the vocabulary are not there."""
        return self._bridge._weight_to_mcore_format(weight.name, list(tensors))

    def to_hf(self, weight: Weight, data: Tensor) -> dict[str, Tensor]:
        """Take a weight apart. Rows above the vocabulary, which pad it, are left out."""
        names, tensors = self._bridge._weight_to_hf_format(weight.name, data)
        return dict(zip(names, tensors, strict=True))

    def check(self, specs: Mapping[str, Spec], where: str) -> list[str]:
        """Compare the tensors of a Hugging Face checkpoint with those that the model has.

        Returns:
            Names of tensors that the model computes or ties, and that are left out.

        Raises:
            ConfigError: naming tensors that are missing, have no place, or another shape or form than they should.
        """
        wanted = self.hf_shapes
        if scales := sorted(name for name in specs if name.endswith(_QUANTISED)):
            raise ConfigError(
                f"{where}: the weights are quantised: {len(scales)} tensors hold scales or packed numbers, such as "
                f"{scales[0]}; take the checkpoint that this one was made from"
            )
        spare = {name for name in specs if name.endswith("rotary_emb.inv_freq")}
        if self.hf_config.tie_word_embeddings:
            spare |= {"lm_head.weight"} & set(specs)
        for problem, names in (
            ("lacks", set(wanted) - set(specs)),
            ("has no place in the model for", set(specs) - set(wanted) - spare),
        ):
            if names:
                raise ConfigError(
                    f"{where} {problem} {len(names)} tensors, such as {', '.join(sorted(names)[:3])}; it has "
                    f"{len(specs)}, the model wants {len(wanted)}"
                )
        for name, shape in wanted.items():
            if specs[name].shape != shape:
                raise ConfigError(
                    f"{where}: {name} has shape {list(specs[name].shape)}, but config.json makes it {list(shape)}"
                )
            if specs[name].dtype not in DTYPES.values():
                raise ConfigError(
                    f"{where}: {name} is {specs[name].dtype}; only {', '.join(DTYPES)} are converted, so undo the "
                    "quantisation first"
                )
        return sorted(spare)


def written_dtypes(model: Model, specs: Mapping[str, Spec], dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Return the dtype of each of Megatron's keys.

    Raises:
        ConfigError: where tensors that become one have several, and `dtype` does not give them one.
    """
    found: dict[str, torch.dtype] = {}
    first: dict[str, str] = {}
    for weight in model.layout.weights:
        for name in model.names(weight):
            wanted = dtype or specs[name].dtype
            if found.setdefault(weight.key, wanted) is not wanted:
                raise ConfigError(
                    f"{name} is {specs[name].dtype} and {first[weight.key]} is {specs[first[weight.key]].dtype}, but "
                    f"in Megatron's format both are part of {weight.key}; give --dtype"
                )
            first.setdefault(weight.key, name)
    return found

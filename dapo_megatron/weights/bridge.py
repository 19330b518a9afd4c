"""mbridge's mapping between Megatron's names and Hugging Face's, with what it gets wrong for us put right."""

from __future__ import annotations

import re
from copy import copy
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.nn import functional

from dapo_megatron.errors import ConfigError

_LOCAL_NAMES = {
    ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
}
"""Norms of Megatron's local layer spec -> the same, fused into the linear layer by Transformer Engine's. It does not
fuse the norm before a router."""
_LOCAL_EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.(linear_fc[12]\.weight)$")
"""A weight of an expert that is a module of its own. Transformer Engine has one for all, with weights that end so:"""
_EXPERT = re.compile(r"(\.experts\.linear_fc[12]\.weight)(\d+)$")
_NAMED_LIKE = {"mistral": "llama"}
"""Model types that mbridge does not know -> those whose tensors have the same names and shapes."""


def make_bridge(hf_config: Any, parallel_states: Any = None) -> Any:
    """Return mbridge's bridge for this architecture.

    Args:
        parallel_states: sizes and ranks (`mbridge.core.parallel_states.ParallelStates`); None for those of Megatron's
            process groups, which have to be there then. Without process groups, give the sizes: `ParallelStates()` is
            one rank that holds the whole model.

    Raises:
        ConfigError: where mbridge does not know the architecture.
    """
    import mbridge  # noqa: F401  (registers the architectures)
    from mbridge.core.bridge import _MODEL_REGISTRY

    base = _MODEL_REGISTRY.get(_NAMED_LIKE.get(hf_config.model_type, hf_config.model_type))
    if base is None:
        raise ConfigError(
            f"model.path: mbridge has no mapping for {hf_config.model_type!r}; use a supported architecture"
        )
    experts = getattr(hf_config, "num_experts", None)
    local_names = {local: fused for local, fused in _LOCAL_NAMES.items() if not experts or "pre_mlp" not in local}
    own_config = copy(hf_config)
    own_config.head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads

    class Bridge(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            # mbridge writes a tied model's mapping into the class, where the next, untied one would find it.
            self._DIRECT_MAPPING = dict(base._DIRECT_MAPPING)
            super().__init__(own_config, parallel_states=parallel_states)

        def _build_config(self) -> Any:
            # Of Megatron's config for the model, which model.py makes, the mapping reads no more.
            return SimpleNamespace(gated_linear_unit=True, num_moe_experts=experts)

        def _adjust_mapping_for_shared_weights(self) -> None:
            # Not every class of mbridge does so.
            if hf_config.tie_word_embeddings:
                self._DIRECT_MAPPING["output_layer.weight"] = self._DIRECT_MAPPING["embedding.word_embeddings.weight"]

        def _weight_name_mapping_mcore_to_hf(self, mcore_weights_name: str) -> list[str]:
            for local, fused in local_names.items():
                mcore_weights_name = mcore_weights_name.replace(local, fused)
            return super()._weight_name_mapping_mcore_to_hf(mcore_weights_name)

        def _weight_name_mapping_mcore_local_to_global(self, model: Any, consider_ep: bool = True) -> dict[str, str]:
            # By the names of experts mbridge finds them, and counts them over expert-parallel ranks.
            found = super()._weight_name_mapping_mcore_local_to_global(model, consider_ep=False)
            first = experts // self.mpu.ep_size * self.mpu.ep_rank if experts and consider_ep else 0

            def of_all(name: str) -> str:
                return _EXPERT.sub(lambda expert: f"{expert[1]}{first + int(expert[2])}", _grouped(name))

            return {local: of_all(name) for local, name in found.items()}

        def _weight_split_across_tp(
            self, mcore_weights_name: str, mcore_weights: Tensor, param: Tensor, tp_split_size: int
        ) -> list[Tensor]:
            if _is_vocabulary(mcore_weights_name):
                if len(mcore_weights) != hf_config.vocab_size:
                    raise ConfigError(
                        f"model.path: {', '.join(self._weight_name_mapping_mcore_to_hf(mcore_weights_name))} has "
                        f"{len(mcore_weights)} rows, but vocab_size is {hf_config.vocab_size} in config.json"
                    )
                rows = param.shape[0]
                parts = [mcore_weights[rows * rank : rows * (rank + 1)] for rank in range(tp_split_size)]
                return [functional.pad(x, (0, 0, 0, rows - len(x))) if len(x) < rows else x for x in parts]
            return super()._weight_split_across_tp(mcore_weights_name, mcore_weights, param, tp_split_size)

        def _weight_to_hf_format(
            self, mcore_weights_name: str, mcore_weights: Tensor
        ) -> tuple[list[str], list[Tensor]]:
            if _is_vocabulary(mcore_weights_name):
                mcore_weights = mcore_weights[: hf_config.vocab_size]
            return super()._weight_to_hf_format(mcore_weights_name, mcore_weights)

    return Bridge()


def _grouped(name: str) -> str:
    """Return the name that Transformer Engine has for a weight of an expert, and any other as it is."""
    return _LOCAL_EXPERT.sub(r".experts.\2\1", name)


def _is_vocabulary(mcore_name: str) -> bool:
    return mcore_name.endswith(("word_embeddings.weight", "output_layer.weight"))

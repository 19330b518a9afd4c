"""What an engine says that it serves, and whether a run can use it: for engines that the run did not start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dapo_megatron.config import Config
from dapo_megatron.errors import EngineError
from dapo_megatron.hf_folder import read_hf_config

KIND = "DAPO_MEGATRON_ENGINE_KIND"
"""Environment variable that tells an engine's server as what kind it was started: an adapter of somebody's own may have
the server of another."""
_SIZES = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "tie_word_embeddings"),
)
"""Of config.json: what the weights have to fit. Which weights they are does not matter, since others are sent."""


@dataclass(frozen=True, slots=True)
class About:
    """What an engine serves, or what a run needs.

    >>> About("vllm", "float32", "gloo", workers=1, sequence_tokens=192, model={"vocab_size": 264}).workers
    1
    """

    kind: str
    """As engine.kind."""
    dtype: str
    """Of the model, as model.dtype."""
    transport: str
    """By which it takes weights, as weights.transport."""
    workers: int
    """Processes that hold its weights (engine.tensor_parallel)."""
    sequence_tokens: int
    """Of the longest sequence that it takes."""
    model: dict[str, Any]
    """Key of config.json -> value, for some keys."""


def sizes_of(hf_config: Any) -> dict[str, Any]:
    """The part of a Hugging Face config that `About.model` has."""
    return {key: getattr(hf_config, key, None) for key in _SIZES}


def needed(config: Config, kind: str) -> About:
    """What `config` needs of every engine of a kind."""
    model = config.model
    return About(
        kind=kind,
        dtype=model.dtype,
        transport=config.weights.transport,
        workers=config.engine.tensor_parallel,
        sequence_tokens=config.max_sequence_tokens,
        model=sizes_of(read_hf_config(model.path, trust_remote_code=model.trust_remote_code)),
    )


def check(name: str, found: About, wanted: About) -> None:
    """
    Raises:
        EngineError: names everything by which the engine is another than the run needs.
    """
    pairs = [
        ("engine.kind", found.kind, wanted.kind),
        ("model.dtype", found.dtype, wanted.dtype),
        ("weights.transport", found.transport, wanted.transport),
        ("engine.tensor_parallel", found.workers, wanted.workers),
        *((f"{key} of the model's config.json", found.model.get(key), value) for key, value in wanted.model.items()),
    ]
    other = [f"{what} is {there}, and {here} in this run" for what, there, here in pairs if there != here]
    if found.sequence_tokens < wanted.sequence_tokens:
        other.append(
            f"it takes sequences of {found.sequence_tokens} tokens, and data.max_prompt_tokens + "
            f"rollout.max_response_tokens = {wanted.sequence_tokens}"
        )
    if other:
        raise EngineError(
            f"{name} is no engine for this run: {'; '.join(other)}. Start it with the run's own config "
            f"(`dapo-megatron engines CONFIG`), or give another of engine.urls"
        )

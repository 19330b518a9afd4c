"""Everything that can be known before a process is started: a run that cannot work is refused in seconds.

Imports neither megatron nor vllm nor torch.distributed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dapo_megatron.actor.layout import check_layout
from dapo_megatron.config import Config, EvalConfig
from dapo_megatron.data.prompts import load_prompts
from dapo_megatron.data.tokenizer import end_token_ids, load_tokenizer
from dapo_megatron.errors import ConfigError
from dapo_megatron.obs.run_folder import check_run_folder
from dapo_megatron.rollout.server import check_port
from dapo_megatron.types import Prompt


@dataclass(frozen=True, slots=True)
class Checked:
    """What the checks found.

    >>> Checked(model={"model_type": "qwen2", ...}, data_parallel=2, train_prompts=8192, eval_prompts=512,
    ...     longest_prompt=10)  # doctest: +SKIP
    """

    model: dict[str, Any]
    """The checkpoint's config.json."""
    data_parallel: int
    train_prompts: int
    eval_prompts: int
    longest_prompt: int
    """Tokens."""


def preflight(config: Config, world_size: int) -> Checked:
    """Check files, sizes, ports and packages for a run of `world_size` ranks.

    Raises:
        ConfigError: for the first thing that cannot work. Cheap checks come first.
    """
    data_parallel = config.parallel.data_parallel(world_size)
    _check_packages(config)
    check_run_folder(config.run)
    _check_eval(config.eval)
    _check_ports(config)
    _check_checkpoint(config.model.path)
    hf_config = _read_hf_config(config)
    check_layout(hf_config, config.parallel)
    _check_engine_layout(hf_config, config)
    _check_context(hf_config, config)

    tokenizer = load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    ends = end_token_ids(tokenizer, config.rollout.stop_token_ids)
    _check_vocabulary("the end tokens hold", ends, hf_config)
    with _without_warnings("dapo_megatron.data"):
        train = load_prompts(config.data, tokenizer, config.data.train)
        held_out = load_prompts(config.data, tokenizer, config.eval.data) if config.eval.data else []
    for prompt in (*train, *held_out):
        _check_vocabulary(f"{prompt.uid} holds", prompt.token_ids, hf_config)
    return Checked(
        model=hf_config.to_dict(),
        data_parallel=data_parallel,
        train_prompts=len(train),
        eval_prompts=len(held_out),
        longest_prompt=_longest((*train, *held_out)),
    )


def _check_packages(config: Config) -> None:
    needed = {
        "megatron.core": "pip install -e '.[cpu]' or '.[gpu]' in the checkout",
        config.engine.kind: "pip install -e '.[cpu]' or '.[gpu]' in the checkout",
    }
    if config.run.tensorboard:
        needed["tensorboard"] = "pip install tensorboard, or set run.tensorboard=false"
    if config.run.wandb_project is not None:
        needed["wandb"] = "pip install -e '.[wandb]', or set run.wandb_project=null"
    if config.run.mlflow_uri is not None:
        needed["mlflow"] = "pip install -e '.[mlflow]', or set run.mlflow_uri=null"
    if config.reward.rule == "math_verify":
        needed["math_verify"] = "pip install math-verify, or set another reward.rule"
    for package, remedy in needed.items():
        if not _installed(package):
            raise ConfigError(f"{package} is not installed, but this run needs it: {remedy}")


def _installed(package: str) -> bool:
    """Without importing it: of a nested one, only whether the folder is there."""
    top, *rest = package.split(".")
    spec = find_spec(top)
    if spec is None or not rest:
        return spec is not None
    return any(Path(place, *rest).is_dir() for place in spec.submodule_search_locations or ())


def _check_eval(config: EvalConfig) -> None:
    if config.data is not None and config.temperature == 0 and config.samples > 1:
        raise ConfigError(
            f"eval.samples({config.samples}) at eval.temperature=0 would be the same response {config.samples} times; "
            f"set eval.samples=1 or a temperature above 0"
        )


def _check_ports(config: Config) -> None:
    engine = config.engine
    if engine.port is None:
        return
    last = engine.port + engine.replicas - 1
    if last > 65_535:
        raise ConfigError(
            f"engine.port({engine.port}) + engine.replicas({engine.replicas}) - 1 = {last} is more than 65535, the "
            f"last port; choose a lower one, or set engine.port=null for free ports"
        )
    for port in range(engine.port, last + 1):
        check_port(engine.host, port)


def _check_checkpoint(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(
            f"model.path {folder} is not a folder; give the folder of a Hugging Face checkpoint (config.json, "
            f"*.safetensors, tokenizer)"
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.path {folder} has no config.json; it is not a Hugging Face checkpoint")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"model.path {folder} has no *.safetensors; convert other formats with save_pretrained of transformers"
        )


def _read_hf_config(config: Config) -> Any:
    from transformers import AutoConfig

    model = config.model
    try:
        return AutoConfig.from_pretrained(model.path, local_files_only=True, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # a broken config.json raises whatever the parser beneath it has
        raise ConfigError(f"cannot read {model.path / 'config.json'}: {error}") from error


def _check_engine_layout(hf_config: Any, config: Config) -> None:
    heads, size = hf_config.num_attention_heads, config.engine.tensor_parallel
    if heads % size:
        raise ConfigError(
            f"engine.tensor_parallel({size}) does not divide the model's num_attention_heads({heads}); "
            f"choose a divisor of {heads}"
        )


def _check_context(hf_config: Any, config: Config) -> None:
    limit, needed = hf_config.max_position_embeddings, config.max_sequence_tokens
    if needed > limit:
        raise ConfigError(
            f"data.max_prompt_tokens({config.data.max_prompt_tokens}) + rollout.max_response_tokens"
            f"({config.rollout.max_response_tokens}) = {needed} is more than the model's "
            f"max_position_embeddings({limit}); lower one of them"
        )


def _check_vocabulary(what: str, tokens: Sequence[int], hf_config: Any) -> None:
    if max(tokens) >= hf_config.vocab_size:
        raise ConfigError(
            f"{what} token {max(tokens)}, but the model has a vocabulary of {hf_config.vocab_size}: "
            f"tokenizer and model do not belong together"
        )


def _longest(prompts: Sequence[Prompt]) -> int:
    return max(len(prompt.token_ids) for prompt in prompts)


@contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    """The run loads its data again, and then says what is worth saying."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

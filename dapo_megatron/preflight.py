"""Everything that can be known before a process is started: a run that cannot work is refused in seconds.

Imports neither megatron nor vllm nor torch.distributed.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dapo_megatron.actor.architecture import check_is_text_model, check_trains, uses_transformer_engine
from dapo_megatron.checkpoint import folder as checkpoints
from dapo_megatron.config import Config, EngineConfig, ModelConfig, OptimizerConfig, RewardConfig, RunConfig
from dapo_megatron.data.prompts import load_prompts
from dapo_megatron.data.stream import PromptStream
from dapo_megatron.data.tokenizer import decoder, end_token_ids, load_tokenizer
from dapo_megatron.errors import ConfigError
from dapo_megatron.hf_folder import count_numbers, read_hf_config, tensor_files
from dapo_megatron.obs.lock import check_free, wait_until_free
from dapo_megatron.obs.run_folder import check_run_folder
from dapo_megatron.obs.sinks import check_sinks
from dapo_megatron.reward.format import TAGS
from dapo_megatron.reward.math import ALWAYS_GRADED, PACKAGES, Rule
from dapo_megatron.rollout.adapter import adapter_for
from dapo_megatron.rollout.nodes import Nodes, shares, with_share
from dapo_megatron.rollout.place import check_gpus
from dapo_megatron.rollout.plan import plan
from dapo_megatron.rollout.ports import check_ports
from dapo_megatron.rollout.token import need_token
from dapo_megatron.rollout.transport import check_transport
from dapo_megatron.types import Prompt
from dapo_megatron.units import size
from dapo_megatron.weights.version_folders import all_versions, newest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EXTRAS = "pip install -e '.[cpu]' in the checkout; with CUDA, as requirements/gpu.txt says"
_TRANSFORMER_ENGINE = "see requirements/gpu.txt, or set model.layers=torch, which is slower"
_MISSING = "import sys, importlib.util as u; print(*(name for name in sys.argv[1:] if u.find_spec(name) is None))"
"""Python that prints those of its arguments that are not installed."""
_ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_UNENCRYPTED = (
    "engines answer only those who have their token, but nothing is encrypted. Whoever can read this network's traffic "
    "has the prompts, the responses and the token, with which weights can be replaced"
)


@dataclass(frozen=True, slots=True)
class Checked:
    """What was read to be checked, so that it need not be read again: tokenizing takes a while."""

    hf_config: Any
    """The model's config.json, as transformers reads it."""
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    """The tokenizer's end token and those of the config."""
    train: Sequence[Prompt]
    """Empty for an evaluation."""
    held_out: Mapping[str, Sequence[Prompt]]
    """Prompts of each set of `Config.held_out`, by its name."""
    warnings: tuple[str, ...]
    """What works, but should be known to the person who runs it."""
    steps_done: int = 0
    """By the checkpoint that the run is to go on from, if that is whole."""
    plan: tuple[str, ...] = ()
    """Lines that say where engines are, and from where they get weights."""
    nodes: Nodes | None = None
    """Where the run may start engines on other machines than the leader's, too."""


def preflight(config: Config, world_size: int, local_ranks: int | None = None, nodes: Nodes | None = None) -> Checked:
    """Check files, sizes, ports, GPUs and packages for a run of `world_size` ranks.

    Args:
        local_ranks: ranks on this machine; None means all of them.
        nodes: the run's machines, where it may start engines on others than this; these have checked their own.

    Raises:
        ConfigError: for the first thing that cannot work. Cheap checks come first.
    """
    config.parallel.data_parallel(world_size)
    _check_optimizer(config.optimizer)
    _check_packages({"megatron.core": _EXTRAS} | _layer_packages(config.model) | _sink_packages(config.run))
    check_run_folder(config)
    here = nodes.here if nodes else with_share(config, shares(config.engine, nodes=1)[0])
    hf_config = _check_sampling(here)
    check_trains(hf_config, config.parallel)
    _check_recompute(config, hf_config.num_hidden_layers)
    numbers = count_numbers(config.model.path)
    policy_bytes = numbers * _ITEM_BYTES[config.model.dtype]
    _check_disk(config, policy_bytes)
    _check_weights_folder(config, policy_bytes)
    ranks_here = world_size if local_ranks is None else local_ranks
    check_transport(config, world_size, ranks_here)
    _check_share(here, ranks_here, nodes)
    who_is_where = plan(config, ranks_here, nodes)
    check_sinks(config.run)
    exposed = _exposure_of_nodes(nodes.addresses if nodes else ())
    if here.engine.count:
        exposed = [*_exposure(here.engine), *exposed]
    told = [*exposed, *_idle(config), *_tight(config, numbers)]
    checked = _read(config, hf_config, told, train=config.data.train)
    _check_format(config.reward, checked.tokenizer)
    steps_done = _check_goes_on(config, checked.train)
    return replace(checked, steps_done=steps_done, plan=who_is_where, nodes=nodes)


def preflight_node(config: Config, ranks: int) -> None:
    """Check what it takes to start engines on another machine of a run, beside its `ranks`.

    Args:
        config: has that machine's share of engine.count, and its address as engine.host.

    Raises:
        ConfigError: as `preflight`.
    """
    _check_engines(config)
    check_gpus(config.engine, ranks)


def _check_share(here: Config, ranks: int, nodes: Nodes | None) -> None:
    """As `check_gpus`, and where this machine has a part of the engines it says which."""
    try:
        check_gpus(here.engine, ranks)
    except ConfigError as error:
        if not nodes or nodes.count == 1:
            raise
        raise ConfigError(f"{nodes.share(0)}: {error}") from error


def _check_goes_on(config: Config, train: Sequence[Prompt]) -> int:
    """Refuse other prompts than those of the run that is to go on. Whether its checkpoint is whole is seen later.

    Returns:
        The steps that are done by it.
    """
    found = checkpoints.candidates(config.run.folder / "checkpoints")[0] if config.run.existing == "resume" else []
    if not found:
        return 0
    try:
        state = json.loads((found[0] / "state.json").read_bytes())
        prompts, steps_done = state["leader"]["prompts"], int(state["shared"]["steps_done"]["value"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0
    try:
        PromptStream(train, config.train.seed).load_state_dict(prompts)
    except ConfigError as error:
        raise ConfigError(f"data.train={config.data.train}: {error}") from error
    return steps_done


def preflight_eval(config: Config) -> Checked:
    """Check what it takes to sample and grade held-out prompts, and nothing that only training needs.

    Raises:
        ConfigError: as `preflight`, and where there are no held-out prompts.
    """
    if not config.held_out:
        raise ConfigError(
            "eval.data is null, and there are no eval.sets: there is nothing to evaluate on; set eval.data=FILE"
        )
    if config.engine.urls:
        raise ConfigError(
            "engine.urls: an evaluation sends no weights, and engines that run already may have others than "
            "model.path; let it start its own: engine.placement=split engine.urls=[] engine.kinds=[]"
        )
    check_grading(*ALWAYS_GRADED, *_held_out_rules(config))
    _check_temperatures(config)
    hf_config = _check_engines(config)
    check_gpus(config.engine, ranks=0)
    return _read(config, hf_config, _exposure(config.engine))


def preflight_engines(config: Config) -> tuple[str, ...]:
    """Check what it takes to start engines on this machine, and nothing else.

    Returns:
        What works, but should be known to the person who starts them.

    Raises:
        ConfigError: as `preflight`.
    """
    _check_engines(config)
    check_transport(config, world_size=0, ranks_here=0)
    addresses = [ip_address(address) for address in _addresses(config.engine.host)]
    if any(address.is_unspecified for address in addresses):
        raise ConfigError(
            f"engine.host={config.engine.host} is every address of this machine, and none to find it at; give the one "
            f"at which the trainer's machine reaches it (`ip -brief address` lists them)"
        )
    check_gpus(config.engine, ranks=0)
    if all(address.is_loopback for address in addresses):
        return (
            f"engine.host={config.engine.host}: no other machine reaches these engines; for a run on another one, set "
            f"engine.host to the address at which it reaches this machine (`ip -brief address` lists them)",
        )
    return tuple(_exposure(config.engine))


def _check_sampling(config: Config) -> Any:
    """Whether engines can serve the model and responses can be graded; returns the model's configuration."""
    check_grading(config.reward.rule, *_held_out_rules(config))
    _check_temperatures(config)
    return _check_engines(config)


def _check_engines(config: Config) -> Any:
    """Whether engines can serve the model; returns the model's configuration."""
    adapters = [adapter_for(config, kind) for kind in sorted(set(config.engine.kinds or [config.engine.kind]))]
    if config.engine.urls:
        need_token(config)
    elif config.engine.count:  # this machine of a run may have none
        for adapter in adapters:
            _check_engine_packages(adapter.packages, config.engine.python)
        check_ports(config.engine)
    hf_config = read_hf_config(config.model.path, trust_remote_code=config.model.trust_remote_code)
    check_is_text_model(hf_config)
    tensor_files(config.model.path)
    for adapter in adapters:
        adapter.check(hf_config)
    _check_context(hf_config, config)
    return hf_config


def _read(config: Config, hf_config: Any, warnings: Iterable[str], train: str | None = None) -> Checked:
    tokenizer = load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    ends = end_token_ids(tokenizer, config.rollout.stop_token_ids)
    _check_vocabulary("the end tokens hold", ends, hf_config)
    told = [*warnings, *_other_ends(config, hf_config, ends)]
    prompts = load_prompts(config.data, tokenizer, train, told.append) if train else []
    held_out = {
        name: load_prompts(its.data, tokenizer, its.source, told.append) for name, its in config.held_out.items()
    }
    for prompt in (prompt for several in (prompts, *held_out.values()) for prompt in several):
        _check_vocabulary(f"{prompt.uid} holds", prompt.token_ids, hf_config)
    told += _repeated(config, held_out)
    return Checked(hf_config, tokenizer, ends, prompts, held_out, tuple(told))


def _other_ends(config: Config, hf_config: Any, ends: Sequence[int]) -> Iterable[str]:
    """A warning where the checkpoint names end tokens that end no response here."""
    try:
        generation = json.loads((config.model.path / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        generation = {}
    named = {"config.json": getattr(hf_config, "eos_token_id", None)}
    if isinstance(generation, dict):
        named["generation_config.json"] = generation.get("eos_token_id")
    others: dict[int, str] = {}
    for file, found in named.items():
        for token in found if isinstance(found, list) else [found]:
            if isinstance(token, int) and token not in ends:
                others.setdefault(token, file)
    if others:
        files = " and ".join(dict.fromkeys(others.values()))
        yield (
            f"model.path: {files} of the model name {sorted(others)} as end tokens, and only {list(ends)} end a "
            f"response: the tokenizer's, and rollout.stop_token_ids. Where the model ends by the others, responses go "
            f"on to their longest: set rollout.stop_token_ids={sorted({*config.rollout.stop_token_ids, *others})}"
        )


def _repeated(config: Config, held_out: Mapping[str, Sequence[Prompt]]) -> Iterable[str]:
    """A warning for each set that has problems more than once."""
    for name, prompts in held_out.items():
        different = len({(prompt.token_ids, prompt.answer) for prompt in prompts})
        if different < len(prompts):
            yield (
                f"{config.held_out[name].source} (set {name}) has {different:,} different problems in {len(prompts):,} "
                f"rows, and each row counts as a problem of its own: intervals over problems will be too narrow, and "
                f"pass@k too low. Keep one row of each, and ask for several responses with samples"
            )


def _check_format(reward: RewardConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a format whose tags cannot be seen in a response's text: special tokens are left out of that."""
    decode = decoder(tokenizer)
    for tag in TAGS if reward.format == "r1" else ():
        token_ids = tokenizer.encode(tag, add_special_tokens=False)
        if tag not in (text := decode(np.array(token_ids, np.int32))):
            raise ConfigError(
                f"reward.format=r1 looks for {tag} in the text of a response, but this tokenizer writes it as tokens "
                f"{token_ids} and reads {text!r} from them: no response could keep the format. Where it is a special "
                f"token, set special to false in tokenizer.json (added_tokens), or set reward.format=none"
            )


def _idle(config: Config) -> Iterable[str]:
    """A warning for what is set and does nothing."""
    if config.memory.offload_reference and not config.algo.kl.coef:
        yield "memory.offload_reference is set, but algo.kl.coef is 0: there is no reference model"
    if config.weights.folder and config.weights.transport != "disk":
        yield f"weights.folder is set, but weights.transport is {config.weights.transport}: nothing is written there"
    for section in config.algo.idle:
        yield f"algo.{section} is set, but algo.loss is {config.algo.loss}: its settings do nothing"


def _held_out_rules(config: Config) -> list[Rule]:
    return [its.rule for its in config.held_out.values()]


def check_grading(*rules: Rule) -> None:
    """
    Raises:
        ConfigError: for rules that import what is not installed.
    """
    needed = {package for rule in rules if (package := PACKAGES.get(rule))}
    _check_packages(
        dict.fromkeys(needed, "pip install math-verify; training does without, with reward.rule=dapo and no eval.rule")
    )


def _layer_packages(model: ModelConfig) -> dict[str, str]:
    return {"transformer_engine": _TRANSFORMER_ENGINE} if uses_transformer_engine(model) else {}


def _check_recompute(config: Config, layers: int) -> None:
    chunks = config.parallel.pp * config.parallel.vpp
    asked = config.memory.recompute_layers
    if asked is not None and asked > layers // chunks:
        raise ConfigError(
            f"memory.recompute_layers({asked}): each model chunk has {layers} / (pp({config.parallel.pp}) x "
            f"vpp({config.parallel.vpp})) = {layers // chunks} layers; leave it out for all of them"
        )


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    """Refuse a step that is a kernel of Transformer Engine where that cannot run."""
    if not optimizer.precision_aware:
        return
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            "optimizer.precision_aware is a step of Transformer Engine on GPUs, and torch sees none; set "
            "optimizer.precision_aware=false"
        )
    _check_packages({"transformer_engine": "see requirements/gpu.txt, or set optimizer.precision_aware=false"})


def _sink_packages(run: RunConfig) -> dict[str, str]:
    needed = {}
    if run.tensorboard:
        needed["tensorboard"] = "pip install tensorboard, or set run.tensorboard=false"
    if run.wandb_project is not None:
        needed["wandb"] = "pip install -e '.[wandb]', or set run.wandb_project=null"
    if run.mlflow_uri is not None:
        needed["mlflow"] = "pip install -e '.[mlflow]', or set run.mlflow_uri=null"
    return needed


def _check_packages(needed: Mapping[str, str]) -> None:
    for package, remedy in needed.items():
        if not _installed(package):
            raise ConfigError(f"{package} is not installed, but this run needs it: {remedy}")


def _check_engine_packages(needed: Mapping[str, str], python: Path | None) -> None:
    """As `_check_packages`, in the interpreter that runs the engine."""
    if python is None:
        _check_packages(needed)
        return
    needed = {**needed, "dapo_megatron": "its workers take the weights; pip install --no-deps the checkout there"}
    try:
        done = subprocess.run([python, "-c", _MISSING, *needed], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"engine.python={python} does not run Python: {error}") from error
    if missing := done.stdout.split():
        raise ConfigError(f"{missing[0]} is not installed for engine.python={python}: {needed[missing[0]]}")


def _installed(package: str) -> bool:
    """Whether it is there, without importing it; for a nested one, whether its folder is."""
    top, *rest = package.split(".")
    spec = find_spec(top)
    if spec is None or not rest:
        return spec is not None
    return any(Path(place, *rest).is_dir() for place in spec.submodule_search_locations or ())


def _check_temperatures(config: Config) -> None:
    for name, its in config.held_out.items():
        if its.temperature == 0 and its.samples > 1:
            raise ConfigError(
                f"eval, set {name}: samples({its.samples}) at temperature=0 would be the same response {its.samples} "
                f"times; set samples=1 or a temperature above 0"
            )


def _exposure(engine: EngineConfig) -> Iterable[str]:
    """A warning, where others than this machine can talk to the engines."""
    if not engine.urls and not all(ip_address(address).is_loopback for address in _addresses(engine.host)):
        yield f"engine.host={engine.host}: {_UNENCRYPTED}; set engine.host=127.0.0.1, or use a network of your own"


def _exposure_of_nodes(addresses: Iterable[str]) -> Iterable[str]:
    """As `_exposure`, of engines on other machines of the run."""
    if exposed := [address for address in addresses if not ip_address(address).is_loopback]:
        yield f"engine.nodes: engines listen at {', '.join(exposed)}: {_UNENCRYPTED}; use a network of your own"


def _addresses(host: str) -> set[str]:
    return {str(info[4][0]) for info in socket.getaddrinfo(host, None)}


def _check_disk(config: Config, policy_bytes: int) -> None:
    """Refuse a run whose policy would not fit on the disk when it is over."""
    parent, free = _room(config)
    if config.run.save_hf and free < policy_bytes:
        raise ConfigError(
            f"run.dir: {parent} has {size(free)} free, and the trained policy takes {size(policy_bytes)} in "
            f"{config.model.dtype}; free some, choose another run.dir, or set run.save_hf=false"
        )


def _tight(config: Config, numbers: int) -> Iterable[str]:
    """A warning where checkpoints of a model of so many numbers will not fit on the disk."""
    settings, adam = config.checkpoint, config.optimizer
    items = [config.model.dtype, "float32", adam.exp_avg_dtype, adam.exp_avg_sq_dtype]
    each = sum(_ITEM_BYTES[dtype] for dtype in items)
    # One more than are kept: the oldest goes once the newest is complete.
    at_once = min(settings.keep_last, config.train.steps // settings.every if settings.every else 0) + 1
    there = len(checkpoints.complete_steps(config.run.folder / "checkpoints"))
    count, (parent, free) = max(1, at_once - there), _room(config)
    if free < count * numbers * each:
        more = "another checkpoint" if count == 1 else f"{count} checkpoints"
        yield (
            f"run.dir: {parent} has {size(free)} free, and {more} of {numbers:,} numbers take {count} x {each} x that "
            f"= {size(count * numbers * each)}. Where none can be written, a run that is stopped has lost its steps: "
            f"free some, choose another run.dir, or see checkpoint.keep_last and checkpoint.every"
        )


def _room(config: Config) -> tuple[Path, int]:
    """The nearest folder above the run's that is there, and the bytes that are free on its disk."""
    parent = next(parent for parent in config.run.folder.absolute().parents if parent.exists())
    return parent, shutil.disk_usage(parent).free


def _check_weights_folder(config: Config, policy_bytes: int) -> None:
    """Refuse a folder in which two versions of the weights do not fit, nothing can be written, or another run writes.

    What is there is removed before the first version is written, but for the newest, which stays until engines have
    loaded that one.
    """
    if config.weights.transport != "disk":
        return
    folder = config.weights_folder.absolute()
    if config.model.path.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"weights.folder: versions are written to {folder}, and old ones removed, but model.path="
            f"{config.model.path} is in there; move it, or choose another weights.folder"
        )
    if folder.resolve() == config.run.folder.resolve():
        raise ConfigError(
            f"weights.folder={config.weights.folder}: versions are written to its folder {config.run.name}, which is "
            f"the run's own (run.dir); choose another weights.folder, or leave it out for {config.run.folder}/weights"
        )
    parent = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"weights.folder: {folder} cannot be written: {parent} is no folder that this user may write")
    check_lock = wait_until_free if config.run.existing == "resume" else check_free
    try:
        check_lock(folder)
        free, last = shutil.disk_usage(parent).free, newest(folder)
        earlier, kept = sum(map(_bytes_in, all_versions(folder))), _bytes_in(last) if last else 0
    except OSError as error:
        raise ConfigError(f"weights.folder: cannot look at {folder}: {error}") from error
    needed = policy_bytes + max(policy_bytes, kept)
    if free + earlier < needed:
        there = f", {size(earlier)} more in versions that are there already" if earlier else ""
        two = f"{size(kept)} (the newest there) + " if kept > policy_bytes else "2 x "
        raise ConfigError(
            f"weights.folder: {parent} has {size(free)} free{there}, and two versions of the weights take {two}"
            f"{size(policy_bytes)} = {size(needed)} in {config.model.dtype}; free some, choose another weights.folder, "
            f"or weights.transport=gloo"
        )


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


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

"""Measures a model on held-out prompts: `dapo-megatron eval CONFIG`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dapo_megatron.checkpoint import folder as checkpoints
from dapo_megatron.config import Config, HeldOut, RewardConfig
from dapo_megatron.data.tokenizer import decoder
from dapo_megatron.errors import ConfigError, DapoError
from dapo_megatron.eval.record import TABLE, Graded, Record, Row, Settings, digests
from dapo_megatron.eval.report import Told, grades_by_rule, set_results, table
from dapo_megatron.hf_folder import lacks_safetensors, tensor_files
from dapo_megatron.obs.lock import FolderLock
from dapo_megatron.obs.run_folder import versions
from dapo_megatron.preflight import Checked
from dapo_megatron.reward.math import ALWAYS_GRADED, Rule
from dapo_megatron.reward.pool import GradingPool
from dapo_megatron.rollout.collect import sample_groups
from dapo_megatron.rollout.engine import Responder, Sampling, request_seed
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.types import Completion, Decode, Group, Prompt
from dapo_megatron.units import counted


def find_model(path: Path) -> Path:
    """Return the folder of a Hugging Face checkpoint in that of one, of a run, or of a run's checkpoint.

    Raises:
        ConfigError: where there is none. Says how to convert a checkpoint of Megatron's.
    """
    if not path.is_dir():
        raise ConfigError(f"--model {path} is not a folder; give one of a Hugging Face checkpoint, or of a run")
    if (path / "config.json").is_file():
        return path
    saved = checkpoints.candidates(path / "checkpoints")[0] if (path / "checkpoints").is_dir() else []
    for folder in (path, *saved[:1]):
        if (folder / "hf/config.json").is_file() and not lacks_safetensors(folder / "hf"):
            return folder / "hf"
    newest = path if (path / checkpoints.MANIFEST).is_file() else next(iter(saved), None)
    if newest is None:
        raise ConfigError(
            f"--model {path} is neither a Hugging Face checkpoint (config.json, *.safetensors) nor the folder of a run "
            f"that has saved one (hf/, checkpoints/)"
        )
    place = newest.resolve()
    run = place.parents[1] if place.parent.name == "checkpoints" else place
    target = run.parent / f"{label(newest)}-hf"
    raise ConfigError(
        f"--model {path} has its weights in Megatron's format only; write them as a Hugging Face checkpoint with\n"
        f"  dapo-megatron convert {shlex.quote(str(newest))} {shlex.quote(str(target))}\n"
        f"and give --model {shlex.quote(str(target))}"
    )


def label(folder: Path) -> str:
    """Return a name for the model in a folder.

    >>> label(Path("runs/quickstart/hf")), label(Path("runs/a/checkpoints/step-20/hf")), label(Path("Qwen2.5-7B"))
    ('quickstart', 'a-step-20', 'Qwen2.5-7B')
    """
    place = folder.absolute()
    place = place.parent if place.name == "hf" else place
    name = f"{place.parents[1].name}-{place.name}" if place.parent.name == "checkpoints" else place.name
    return re.sub(r"[^A-Za-z0-9._-]", "_", name) or "model"


def output_folder(config: Config) -> Path:
    """Return where an evaluation of model.path goes unless something else is said."""
    return config.run.dir / f"{config.run.name}-eval" / label(config.model.path)


def rules_of(its: HeldOut) -> tuple[Rule, ...]:
    """Return the rules that a set is graded by, its own first."""
    return tuple(dict.fromkeys([its.rule, *ALWAYS_GRADED]))


def settings_of(config: Config, checked: Checked) -> Settings:
    """Return what decides on the result of an evaluation, with names for what weights and prompts hold."""
    sets: dict[str, Any] = {}
    for name, its in config.held_out.items():
        how = {"samples": its.samples, "temperature": its.temperature, "top_p": its.top_p}
        how |= {"rules": sorted(rules_of(its))}
        sets |= {f"{name}.{key}": value for key, value in {**digests(checked.held_out[name]), **how}.items()}
    decisive = {
        "model": _digest(config.model.path),
        "dtype": config.model.dtype,
        "engine": config.engine.kind,
        "engine.tensor_parallel": config.engine.tensor_parallel,
        "engine.batch_invariant": config.engine.batch_invariant,
        "engine.extra_args": config.engine.extra_args,
        "seed": config.sampling_seed,
        "max_response_tokens": config.rollout.max_response_tokens,
        "stop_token_ids": list(checked.stop_token_ids),
        "truncated_is_wrong": config.reward.truncated_is_wrong,
        "grading_seconds": config.reward.timeout_seconds,
        "sets": list(config.held_out),
        **sets,
    }
    sources = {name: its.source for name, its in config.held_out.items()}
    return Settings(decisive, {"model": str(config.model.path), "data": sources, "versions": versions()})


def evaluate_model(
    config: Config,
    checked: Checked,
    folder: Path,
    say: Callable[[str], None],
    start: Callable[[Config, Path], Any] = lambda config, folder: Engines(config, folder, ranks=0),
) -> Told:
    """Sample and grade what is missing in `folder`, and tell what all of it comes to.

    Args:
        checked: what `preflight_eval` read.
        say: is told what a person should know meanwhile.
        start: starts engines that write their logs to a folder. Not called where nothing is missing.

    Raises:
        ConfigError: where the folder is the model's or in it, holds an evaluation with other settings, or another
            process works on it.
        EngineError: when an engine fails. What was finished is there, and the next call goes on with it.
    """
    held_out = config.held_out
    _check_beside_model(folder, config.model.path)
    settings = settings_of(config, checked)
    with ExitStack() as stack:
        with _writable(folder, ConfigError):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(closing(FolderLock(folder)))
            record = Record(folder, settings, {name: its.samples for name, its in held_out.items()})
        for line in _other_versions(record.origin["versions"], settings.origin["versions"]):
            say(f"warning: {line}")
        left = {name: record.missing(name, checked.held_out[name]) for name in held_out}
        for name, its in held_out.items():
            number = len(checked.held_out[name])
            there = f"; done already: {counted(done, 'prompt')}" if (done := number - len(left[name])) else ""
            say(f"{name}: {counted(number, 'prompt')} x {counted(its.samples, 'response')}{there}")
        with _writable(folder, DapoError):
            if any(left.values()):
                say(f"starting engines; responses and {TABLE} go to {folder}, with the engines' logs")
                rules: set[Rule] = {rule for its in held_out.values() for rule in rules_of(its)}
                pools: dict[Rule, GradingPool] = {
                    rule: stack.enter_context(closing(_pool(rule, config.reward))) for rule in sorted(rules)
                }
                sampler = Sampler(config, checked, decoder(checked.tokenizer), pools)
                engines = stack.enter_context(closing(start(config, folder)))
                engines.wait_ready()
                for name, missing in left.items():
                    engines.sample(sampler.sample(engines, held_out[name], missing, partial(record.add, name)))
            rows = {name: record.finish(name, checked.held_out[name]) for name in held_out}
            told = _tell(rows, held_out, Settings(settings.decisive, record.origin))
            record.conclude(told.results, told.table + "\n")
    return told


@dataclass(frozen=True, slots=True)
class Sampler:
    """Samples and grades the responses to prompts of a set, with the seeds that they have in the whole set."""

    config: Config
    checked: Checked
    decode: Decode
    pools: Mapping[Rule, GradingPool]
    """Rule -> what grades by it."""

    async def sample(
        self, engines: Responder, its: HeldOut, missing: Sequence[Prompt], keep: Callable[[Sequence[Row]], None]
    ) -> None:
        """Have `keep` take the rows of each prompt, as soon as they are graded."""
        places = {prompt.uid: place for place, prompt in enumerate(self.checked.held_out[its.name])}

        def seed(_: int, uid: str) -> int:
            return request_seed(self.config.sampling_seed, "eval", places[uid], uid)

        async def grade(prompt: Prompt, completions: Sequence[Completion]) -> Group:
            rows = await self._rows(its, prompt, completions, seed(0, prompt.uid))
            keep(rows)
            own = [row.grades[its.rule] for row in rows]
            extracted, correct = (tuple(grade.extracted for grade in own), tuple(grade.correct for grade in own))
            return Group(prompt, tuple(completions), extracted, correct, tuple(map(float, correct)))

        cap = self.config.rollout.max_response_tokens
        sampling = Sampling(its.temperature, its.top_p, cap, self.checked.stop_token_ids)
        await sample_groups(engines, missing, grade, sampling, its.samples, seed)

    async def _rows(self, its: HeldOut, prompt: Prompt, completions: Sequence[Completion], seed: int) -> list[Row]:
        texts = await asyncio.to_thread(lambda: [self.decode(completion.token_ids) for completion in completions])
        items = [(text, prompt.answer) for text in texts]
        grades = {rule: await self.pools[rule].grade(items) for rule in rules_of(its)}
        punished = self.config.reward.truncated_is_wrong
        return [
            Row(
                uid=prompt.uid,
                sample=sample,
                answer=prompt.answer,
                seed=seed,
                length=completion.length,
                truncated=completion.truncated,
                grades={
                    rule: Graded.of(found[sample], wrong=punished and completion.truncated)
                    for rule, found in grades.items()
                },
                text=text,
                token_ids=completion.token_ids.tolist(),
            )
            for sample, (completion, text) in enumerate(zip(completions, texts, strict=True))
        ]


def _check_beside_model(folder: Path, model: Path) -> None:
    """What is written into a model's folder would count as part of the model (`_digest`)."""
    if folder.resolve().is_relative_to(model.resolve()):
        raise ConfigError(
            f"the evaluation would be written to {folder}, into the folder of the model itself, {model}; choose "
            f"another folder: --out DIR"
        )


def _other_versions(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [
        f"begun with {name} {old.get(name)}, goes on with {new.get(name)}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]


def _pool(rule: Rule, reward: RewardConfig) -> GradingPool:
    return GradingPool(rule, reward.workers, reward.timeout_seconds)


def _tell(rows: Mapping[str, Sequence[Sequence[Row]]], held_out: Mapping[str, HeldOut], settings: Settings) -> Told:
    results = {
        name: {
            **set_results(grades_by_rule(rows_PK), rows_PK),
            "rule": held_out[name].rule,
            "temperature": held_out[name].temperature,
            "top_p": held_out[name].top_p,
        }
        for name, rows_PK in rows.items()
    }
    tables = [table(name, found) for name, found in results.items()]
    return Told({**settings.origin, "sets": results}, "\n\n".join(tables))


def _digest(folder: Path) -> str:
    """Return a name for the weights, configuration and tokenizer in a folder: a hash of all that they hold."""
    files = [
        *set(tensor_files(folder).values()),
        *folder.glob("*.json"),
        *folder.glob("*.model"),
        *folder.glob("*.txt"),
    ]
    ordered = sorted(files)

    def hashed(path: Path) -> bytes:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    with ThreadPoolExecutor(8) as threads:  # hashing lets go of the interpreter's lock
        hashes = list(threads.map(hashed, ordered))
    whole = hashlib.sha256()
    for path, found in zip(ordered, hashes, strict=True):
        whole.update(json.dumps(path.name).encode() + found)
    return whole.hexdigest()[:16]


@contextmanager
def _writable(folder: Path, kind: type[DapoError]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise kind(f"cannot write the evaluation to {folder}: {error.strerror}: {error.filename}") from error

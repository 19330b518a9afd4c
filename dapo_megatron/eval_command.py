"""What `dapo-megatron eval` does: measure a model, compare two evaluations, grade responses that are there."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo_megatron.checkpoint import folder as checkpoints
from dapo_megatron.config import Config, HeldOut, RewardConfig
from dapo_megatron.data.sources import read_rows as read_json_rows
from dapo_megatron.data.tokenizer import decoder
from dapo_megatron.errors import ConfigError
from dapo_megatron.eval.record import (
    RESULTS,
    TABLE,
    Graded,
    Record,
    Row,
    Settings,
    digests,
    read_rows,
    read_settings,
)
from dapo_megatron.eval.report import compare, comparison_table, grades_by_rule, set_results, table
from dapo_megatron.hf_folder import lacks_safetensors, tensor_files
from dapo_megatron.obs.lock import FolderLock
from dapo_megatron.obs.run_folder import versions
from dapo_megatron.preflight import Checked, check_grading
from dapo_megatron.reward.math import ALWAYS_GRADED, Rule
from dapo_megatron.reward.pool import GradingPool
from dapo_megatron.rollout.collect import sample_groups
from dapo_megatron.rollout.engine import Responder, Sampling, request_seed
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.types import Completion, Decode, Group, Prompt


@dataclass(frozen=True, slots=True)
class Told:
    """What a command has to say."""

    results: dict[str, Any]
    """For programs: plain values."""
    table: str
    """For people."""


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
    target = path.resolve().parent / f"{label(newest)}-hf"
    raise ConfigError(
        f"--model {path} has its weights in Megatron's format only; write them as a Hugging Face checkpoint with\n"
        f"  dapo-megatron convert {newest} {target}\n"
        f"and give --model {target}"
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
        how = {"samples": its.samples, "temperature": its.temperature, "top_p": its.top_p, "rules": list(rules_of(its))}
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
        ConfigError: where the folder holds an evaluation with other settings, or another process works on it.
        EngineError: when an engine fails. What was finished is there, and the next call goes on with it.
    """
    held_out = config.held_out
    settings = settings_of(config, checked)
    with _writable(folder), ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(closing(FolderLock(folder)))
        record = Record(folder, settings, {name: its.samples for name, its in held_out.items()})
        left = {name: record.missing(name, checked.held_out[name]) for name in held_out}
        for name, its in held_out.items():
            done, number = len(checked.held_out[name]) - len(left[name]), len(checked.held_out[name])
            there = f"; {done:,} prompts are done already" if done else ""
            say(f"{name}: {number:,} prompts x {its.samples} responses{there}")
        if any(left.values()):
            say(f"starting engines; responses and {TABLE} go to {folder}, with the engines' logs")
            decode = decoder(checked.tokenizer)
            rules = {rule: None for its in held_out.values() for rule in rules_of(its)}
            pools = {rule: stack.enter_context(closing(_pool(rule, config.reward))) for rule in rules}
            engines = stack.enter_context(closing(start(config, folder)))
            engines.wait_ready()
            for name, its in held_out.items():
                work = sample_missing(
                    engines,
                    left[name],
                    checked,
                    its,
                    config,
                    decode,
                    lambda rows, name=name: record.add(name, rows),
                    pools,
                )
                engines.sample(work)
        rows = {name: record.finish(name, checked.held_out[name]) for name in held_out}
        told = _tell(rows, held_out, settings)
        record.conclude(told.results, told.table + "\n")
    return told


async def sample_missing(
    engines: Responder,
    missing: Sequence[Prompt],
    checked: Checked,
    its: HeldOut,
    config: Config,
    decode: Decode,
    keep: Callable[[Sequence[Row]], None],
    pools: Mapping[Rule, GradingPool],
) -> None:
    """Sample and grade the responses to `missing`, with the seeds that they have in the whole set.

    Args:
        keep: is given the rows of each prompt as soon as they are graded.
        pools: rule -> what grades by it.
    """
    places = {prompt.uid: place for place, prompt in enumerate(checked.held_out[its.name])}

    def seed(uid: str) -> int:
        return request_seed(config.sampling_seed, "eval", places[uid], uid)

    async def grade(prompt: Prompt, completions: Sequence[Completion]) -> Group:
        texts = await asyncio.to_thread(lambda: [decode(completion.token_ids) for completion in completions])
        items = [(text, prompt.answer) for text in texts]
        grades = {rule: await pools[rule].grade(items) for rule in rules_of(its)}
        punished = config.reward.truncated_is_wrong
        rows = [
            Row(
                uid=prompt.uid,
                sample=sample,
                answer=prompt.answer,
                seed=seed(prompt.uid),
                length=completion.length,
                truncated=completion.truncated,
                grades={
                    rule: Graded(
                        found[sample].correct and not (punished and completion.truncated),
                        found[sample].extracted,
                        found[sample].timed_out,
                    )
                    for rule, found in grades.items()
                },
                text=texts[sample],
                token_ids=completion.token_ids.tolist(),
            )
            for sample, completion in enumerate(completions)
        ]
        keep(rows)
        own = [row.grades[its.rule] for row in rows]
        correct = tuple(grade.correct for grade in own)
        return Group(
            prompt, tuple(completions), tuple(grade.extracted for grade in own), correct, tuple(map(float, correct))
        )

    sampling = Sampling(its.temperature, its.top_p, config.rollout.max_response_tokens, checked.stop_token_ids)
    await sample_groups(engines, missing, grade, sampling, its.samples, lambda _, uid: seed(uid))


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


def compare_outputs(first: Path, second: Path) -> Told:
    """Compare two evaluations of the same problems, by a paired bootstrap over problems.

    Raises:
        ConfigError: where one is none or unfinished, or problems, samples or rules differ.
    """
    one, two = read_settings(first).decisive, read_settings(second).decisive
    for folder in (first, second):
        if not (folder / RESULTS).is_file():
            raise ConfigError(f"the evaluation in {folder} is not finished ({RESULTS} is missing); start it again")
    same = ["sets", "truncated_is_wrong", *(f"{name}.{key}" for name in one["sets"] for key in _TO_COMPARE)]
    if problems := [f"  {key}: {one.get(key)} and {two.get(key)}" for key in same if one.get(key) != two.get(key)]:
        raise ConfigError(
            f"{first} and {second} cannot be compared problem by problem:\n"
            + "\n".join(problems)
            + "\nevaluate both with the same sets, samples and rules"
        )
    rows = [
        {name: [*read_rows(folder / f"{name}.jsonl", one[f"{name}.samples"]).values()] for name in one["sets"]}
        for folder in (first, second)
    ]
    compared = compare(*rows)
    other = {
        key: [one.get(key), two.get(key)]
        for key in {**one, **two}
        if one.get(key) != two.get(key) and not key.endswith(".prompts")
    }
    lines = [f"first   {first}", f"second  {second}", *(f"{key}: {a} and {b}" for key, (a, b) in other.items())]
    return Told(
        {"first": str(first), "second": str(second), "settings_differ": other, "sets": compared},
        "\n".join([*lines, "", comparison_table(compared)]),
    )


_TO_COMPARE = ("problems", "samples", "rules")


def grade_file(path: Path, reward: RewardConfig | None = None) -> Told:
    """Grade responses that are there: rows of uid, answer and responses, a list of texts.

    Raises:
        ConfigError: naming row and field, where one is not as it has to be.
    """
    reward = reward or RewardConfig()
    check_grading(*ALWAYS_GRADED)
    given = list(_responses(path))
    grades: dict[str, list[list[Graded]]] = {}
    for rule in ALWAYS_GRADED:
        with _pool(rule, reward) as pool:
            items = [(text, answer) for _, answer, texts in given for text in texts]
            found = iter(asyncio.run(pool.grade(items)))
        grades[rule] = [[_graded(next(found)) for _ in texts] for _, _, texts in given]
    results = set_results(grades)
    one, other = ALWAYS_GRADED
    differing = [
        {"uid": uid, "sample": sample, "answer": answer, "text": texts[sample][-300:]}
        | {rule: {"correct": g.correct, "extracted": g.extracted} for rule, g in ((one, a), (other, b))}
        for (uid, answer, texts), ones, others in zip(given, grades[one], grades[other], strict=True)
        for sample, (a, b) in enumerate(zip(ones, others, strict=True))
        if a.correct != b.correct
    ]
    return Told({"responses": str(path), **results, "differing": differing}, table(path.name, results))


def _graded(grade: Any) -> Graded:
    return Graded(grade.correct, grade.extracted, grade.timed_out)


def _responses(path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Yield uid, answer and responses of every row."""
    seen: dict[str, str] = {}
    samples: tuple[int, str] | None = None
    for place, row in read_json_rows(str(path)):

        def refuse(field: str, expected: str, place: str = place, row: Mapping[str, Any] = row) -> ConfigError:
            given = f"got {row[field]!r:.80}" if field in row else f"it is missing; the row has {', '.join(row)}"
            return ConfigError(f"{place}: {field} must be {expected}; {given}")

        uid, answer, texts = row.get("uid"), row.get("answer"), row.get("responses")
        if not isinstance(uid, str) or not uid:
            raise refuse("uid", "text")
        if uid in seen:
            raise ConfigError(
                f"{place}: uid {uid!r} is there already, in {seen[uid]}; a row has all responses to a problem"
            )
        if not isinstance(answer, str) or not answer.strip():
            raise refuse("answer", "text, the gold answer")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise refuse("responses", "a list of texts, at least one")
        if samples and len(texts) != samples[0]:
            raise ConfigError(
                f"{place}: responses has {len(texts)} texts, and {samples[1]} has {samples[0]}: avg@k, pass@k and maj@k "
                f"want as many for every problem"
            )
        seen[uid], samples = place, samples or (len(texts), place)
        yield uid, answer, texts


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
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot use {folder} for the evaluation: {error.strerror}: {error.filename}") from error

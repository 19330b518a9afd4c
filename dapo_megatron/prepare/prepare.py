"""The way from sources to a folder that a run reads: evaluation sets first, because training problems are compared with
them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapo_megatron import __version__
from dapo_megatron.checkpoint.folder import describe
from dapo_megatron.config import DataConfig
from dapo_megatron.convert.output import refuse_existing, unfinished
from dapo_megatron.data.prompts import encode
from dapo_megatron.errors import ConfigError
from dapo_megatron.prepare import filters, output
from dapo_megatron.prepare.filters import Filtered
from dapo_megatron.prepare.overlap import Overlap, overlaps
from dapo_megatron.prepare.rows import Fields, Problem, problems_of
from dapo_megatron.prepare.sources import Say, Source, find
from dapo_megatron.units import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAIN = "train"
REPORTED = 0.5
"""Of the share that has a problem left out: pairs from there on are reported, for a person to look at."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be prepared, and how."""

    train: Sequence[str]
    """Sources (see `sources.find`); together they become one set."""
    evaluation: Sequence[str]
    """Sources; each becomes a set of its own."""
    folder: Path | None
    """Where named sets lie; None is the hub."""
    fields: Fields
    """Of sources that have no name."""
    languages: Sequence[str] | None
    """Of training problems; None keeps all."""
    ngram: int
    """Words that a run has by which problems are compared."""
    share: float
    """A training problem is left out where it has this share of the runs of an evaluation problem."""
    prompt: DataConfig
    """Templates, and the limit on the tokens of a prompt."""
    tokenizer: PreTrainedTokenizerBase | None
    """None counts no tokens."""


@dataclass(frozen=True, slots=True)
class _Set:
    name: str
    sources: Sequence[Source]
    filtered: Filtered

    @property
    def problems(self) -> list[Problem]:
        return self.filtered.problems

    @property
    def file(self) -> str:
        return f"{self.name}.parquet"


def prepare(plan: Plan, target: Path, say: Say) -> dict[str, Any]:
    """Write the folder `target`, or nothing.

    Args:
        say: is told how far it has come, a line at a time.

    Returns:
        The data card.

    Raises:
        ConfigError: for sources that are not there, rows that cannot be read, filters that leave nothing, a tokenizer
            that changes prompts, and where `target` is there.
        DapoError: where the hub cannot be reached, or the disk takes no more.
    """
    refuse_existing(target)
    sources = {word: find(word, plan.folder, say) for word in dict.fromkeys([*plan.train, *plan.evaluation])}
    train_sources = [sources[word] for word in plan.train]
    held_out_sources = [sources[word] for word in plan.evaluation]
    _check_names([source.name for source in train_sources], [source.name for source in held_out_sources])
    held_out = [_evaluation(source, plan, say) for source in held_out_sources]
    train, pairs = _training(train_sources, held_out, plan, say)
    sets = [train, *held_out]
    card = _card(plan, train, held_out, pairs)
    nbytes = sum(len(problem.text.encode()) for part in sets for problem in part.problems)
    with unfinished(target, nbytes) as folder:
        for part in sets:
            output.write_problems(folder / part.file, part.problems)
        output.write_lines(folder / output.REMOVED, train.filtered.removed)
        output.write_lines(folder / output.OVERLAP, (_as_row(pair, plan) for pair in pairs))
        output.write_card(folder, card)
    return card


def _check_names(train: Sequence[str], held_out: Sequence[str]) -> None:
    for option, names in (("--train", train), ("--eval", held_out)):
        if twice := next((name for name, count in Counter(names).items() if count > 1), None):
            raise ConfigError(f"{option} has two sets called {twice}; rename a file, or give it once")
    if TRAIN in held_out:
        raise ConfigError(f"--eval: {TRAIN}.parquet is the name of the training set's file; rename the other one")
    if both := next((name for name in train if name in held_out), None):
        raise ConfigError(f"{both} is to be trained on and held out; leave it in one of --train and --eval")


def _evaluation(source: Source, plan: Plan, say: Say) -> _Set:
    """An evaluation set is made of all its problems: only its repeats are left out."""
    filtered = filters.distinct(problems_of(source, plan.fields))
    if contradictory := filtered.removed:
        first = contradictory[0]
        uids = ", ".join(f"{answer} in {uid}" for answer, uid in first["answers"].items())
        raise ConfigError(
            f"--eval {source.name}: {counted(len(contradictory), 'problem')} with different answers, such as {uids}; "
            "an evaluation set is not changed here: leave one of the rows in it"
        )
    say(f"{source.name}: {counted(filtered.rows, 'row')}, {counted(len(filtered.problems), 'problem')}")
    _warn_of_turns(source.name, filtered, say)
    if images := sum(problem.has_image for problem in filtered.problems):
        say(f"warning: {source.name}: {counted(images, 'problem')} with an image or a link stay in it")
    if long := sum(tokens > plan.prompt.max_prompt_tokens for tokens in _tokens(filtered.problems, plan)):
        say(
            f"warning: {source.name}: {counted(long, 'prompt')} with more than {plan.prompt.max_prompt_tokens:,} "
            "tokens stay in it; data.long_prompts decides what an evaluation does with them"
        )
    return _Set(source.name, [source], filtered)


def _training(sources: Sequence[Source], held_out: Sequence[_Set], plan: Plan, say: Say) -> tuple[_Set, list[Overlap]]:
    say(f"{TRAIN}: reading {', '.join(source.name for source in sources)} ...")
    filtered = filters.distinct(problem for source in sources for problem in problems_of(source, plan.fields))
    say(f"{TRAIN}: {counted(filtered.rows, 'row')}")
    _warn_of_turns(TRAIN, filtered, say)
    filters.without_images(filtered)
    if plan.languages:
        filters.only_languages(filtered, plan.languages)
    pairs = []
    if held_out:
        pairs = overlaps(
            filtered.problems,
            [problem for part in held_out for problem in part.problems],
            plan.ngram,
            least=plan.share * REPORTED,
        )
        worst = {pair.train: pair for pair in reversed(pairs) if pair.share >= plan.share}
        filtered.leave_out(
            "overlap",
            f"{plan.share:.0%} or more of the runs of {plan.ngram} words of an evaluation problem",
            lambda problem: _evidence(worst[problem]) if problem in worst else None,
        )
    if plan.tokenizer:
        limit = plan.prompt.max_prompt_tokens
        tokens = dict(zip(filtered.problems, _tokens(filtered.problems, plan), strict=True))
        filtered.leave_out(
            "length",
            f"more than {limit:,} tokens with the template",
            lambda problem: {"tokens": tokens[problem]} if tokens[problem] > limit else None,
        )
    for step in filtered.steps:
        say(f"{TRAIN}: {step['filter']}: {step['removed']:,} left out, {step['left']:,} stay")
    return _Set(TRAIN, sources, filtered), pairs


def _warn_of_turns(name: str, filtered: Filtered, say: Say) -> None:
    if more := sum(problem.has_other_turns for problem in filtered.problems):
        say(
            f"warning: {name}: {counted(more, 'problem')} with other chat messages beside the user's last one, such as "
            "the system's; they are left out: what every prompt needs of them belongs into data.template"
        )


def _tokens(problems: Sequence[Problem], plan: Plan) -> list[int]:
    if not plan.tokenizer:
        return []
    encoded = encode(
        [problem.text for problem in problems], [problem.uid for problem in problems], plan.prompt, plan.tokenizer
    )
    return [len(token_ids) for _, token_ids in encoded]


def _evidence(pair: Overlap) -> dict[str, Any]:
    return {
        "evaluation_set": pair.evaluation.source,
        "evaluation_uid": pair.evaluation.uid,
        "shared": pair.shared,
        "of": pair.of,
        "longest": pair.longest,
    }


def _as_row(pair: Overlap, plan: Plan) -> dict[str, Any]:
    return {
        "uid": pair.train.uid,
        "removed": pair.share >= plan.share,
        "ngram": plan.ngram,
        **_evidence(pair),
        "prompt": pair.train.text,
        "evaluation_prompt": pair.evaluation.text,
    }


def _card(plan: Plan, train: _Set, held_out: Sequence[_Set], pairs: Sequence[Overlap]) -> dict[str, Any]:
    """Everything about it but the files, which are not written yet. No time and no place: the same input gives the same
    bytes.
    """
    prompt = {"template": plan.prompt.template, "chat_template": plan.prompt.chat_template}
    if plan.tokenizer:
        prompt["max_prompt_tokens"] = plan.prompt.max_prompt_tokens
    return {
        "made_by": f"dapo_megatron {__version__}",
        "languages": plan.languages,
        "prompt": prompt,
        "train": _account(train),
        "evaluation": {part.name: _account(part) for part in held_out},
        "overlap": {
            "ngram": plan.ngram,
            "share": plan.share,
            "sets": {part.name: _count(part.name, pairs, plan.share) for part in held_out},
        },
    }


def _account(part: _Set) -> dict[str, Any]:
    return {
        "file": part.file,
        "rows": part.filtered.rows,
        "filters": part.filtered.steps,
        "problems": len(part.problems),
        "languages": dict(Counter(problem.language for problem in part.problems).most_common()),
        "sources": [_origin(source) for source in part.sources],
    }


def _origin(source: Source) -> dict[str, Any]:
    files = [(file.name, describe(file)) for file in source.files]
    return {
        "name": source.name,
        "repository": source.repository,
        "revision": source.revision,
        "licence": source.licence,
        "files": [{"name": name, "bytes": file.bytes, "sha256": file.sha256} for name, file in files],
    }


def _count(name: str, pairs: Sequence[Overlap], share: float) -> dict[str, int]:
    of_set = [pair for pair in pairs if pair.evaluation.source == name]
    removed = {pair.train for pair in of_set if pair.share >= share}
    return {
        "problems": len({pair.evaluation for pair in of_set if pair.share >= share}),
        "removed": len(removed),
        "kept": len({pair.train for pair in of_set} - removed),
    }

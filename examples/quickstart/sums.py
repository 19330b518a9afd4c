"""The problem of the quick-start: sums of one-digit numbers, a tokenizer for them, and two habits of answering."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from examples.quickstart.recipe import GUESS_ERROR, GUESSES, SLIPS

END = "<|endoftext|>"
VOCABULARY = [END, "Answer:", " ", "\n", "+", "=", ",", *"0123456789"]

Numbers = tuple[int, ...]


def tokenizer() -> PreTrainedTokenizerFast:
    """Characters, and `Answer:` as one token."""
    core = Tokenizer(models.WordLevel({token: index for index, token in enumerate(VOCABULARY)}, unk_token=END))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"Answer:|.|\n"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=END)


def problem(rng: random.Random) -> Numbers:
    return tuple(rng.randint(1, 9) for _ in range(rng.randint(3, 5)))


def question(numbers: Numbers) -> str:
    return "+".join(map(str, numbers)) + "="


def guess(numbers: Numbers, rng: random.Random) -> str:
    return f"Answer: {sum(numbers) + rng.randint(-GUESS_ERROR, GUESS_ERROR)}"


def worked(numbers: Numbers, rng: random.Random) -> str:
    """Adds one number at a time, with a slip now and then, and believes the last result."""
    steps, total = [], numbers[0]
    for number in numbers[1:]:
        slip = rng.choice([-1, 1, 10]) if rng.random() < SLIPS else 0
        steps.append(f"{total}+{number}={total + number + slip}")
        total += number + slip
    return ",".join(steps) + f"\nAnswer: {total}"


def demonstration(numbers: Numbers, rng: random.Random) -> str:
    return guess(numbers, rng) if rng.random() < GUESSES else worked(numbers, rng)


def split(seed: int, held_out: int, train: int) -> tuple[list[Numbers], list[Numbers]]:
    """Distinct problems: (held out, to train on). The held-out ones depend on nothing but their number."""
    rng = random.Random("held out")
    kept: dict[Numbers, None] = {}
    while len(kept) < held_out:
        kept[problem(rng)] = None
    rng = random.Random(seed)
    rest: dict[Numbers, None] = {}
    while len(rest) < train:
        if (numbers := problem(rng)) not in kept:
            rest[numbers] = None
    return list(kept), list(rest)


def write(path: Path, problems: Iterable[Numbers]) -> None:
    rows = ({"prompt": question(numbers), "answer": str(sum(numbers))} for numbers in problems)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

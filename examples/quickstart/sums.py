"""The problem of the quick-start: sums of one-digit numbers, a tokenizer for them, and two habits of answering."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

from transformers import AddedToken, Qwen2Tokenizer

from examples.quickstart.recipe import GUESS_ERROR, GUESSES, SLIPS

END = "<|endoftext|>"
VOCABULARY = [END, "Answer:", " ", "\n", "+", "=", ",", *"0123456789"]

Numbers = tuple[int, ...]


def tokenizer() -> Qwen2Tokenizer:
    """Build a tokenizer of characters, and `Answer:` as one token: Qwen2's, as the model is, without merges."""
    as_bytes = {" ": "Ġ", "\n": "Ċ"}  # how byte-level vocabularies write them
    core = Qwen2Tokenizer({as_bytes.get(token, token): index for index, token in enumerate(VOCABULARY)}, [])
    core.add_tokens(AddedToken("Answer:", normalized=False))
    return core


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

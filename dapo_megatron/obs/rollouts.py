"""What the model wrote, for reading: a few groups of every step as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dapo_megatron.types import Decode, Group


class RolloutWriter:
    """Writes the first `groups` groups of a step, one a line.

    A line is {"step", "uid", "prompt", "answer", "responses": [{"text", "extracted", "correct", "reward", "length",
    "finish", "versions"}, ...]}.
    """

    def __init__(self, path: Path, groups: int, decode: Decode) -> None:
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")
        self._groups, self._decode = groups, decode

    def write(self, step: int, groups: Sequence[Group]) -> None:
        for group in groups[: self._groups]:
            # Model output may hold halves of surrogate pairs, which have no bytes in UTF-8: JSON spells them \ud83d.
            self._file.write(json.dumps({"step": step, **_plain(group, self._decode)}, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _plain(group: Group, decode: Decode) -> dict[str, object]:
    responses = zip(group.completions, group.extracted, group.correct, group.rewards, strict=True)
    return {
        "uid": group.prompt.uid,
        "prompt": group.prompt.text,
        "answer": group.prompt.answer,
        "responses": [
            {
                "text": decode(completion.token_ids),
                "extracted": extracted,
                "correct": correct,
                "reward": reward,
                "length": completion.length,
                "finish": completion.finish.value,
                "versions": [asdict(span) for span in completion.versions],
            }
            for completion, extracted, correct, reward in responses
        ],
    }

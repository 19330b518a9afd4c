"""What the model wrote, for reading: a few groups of every step as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dapo_megatron.obs.place import Lines
from dapo_megatron.types import Decode, Group


class RolloutWriter:
    """Writes the first `groups` groups of a step, one a line.

    A line is {"step", "uid", "prompt", "answer", "responses": [{"text", "extracted", "correct", "reward", "length",
    "finish", "versions"}, ...]}.
    """

    def __init__(self, path: Path, groups: int, decode: Decode) -> None:
        self._lines, self._groups, self._decode = Lines(path), groups, decode

    def write(self, step: int, groups: Sequence[Group]) -> None:
        """Append a step, whole or not at all.

        Raises:
            OSError: where it cannot be written.
        """
        rows = ({"step": step, **_plain(group, self._decode)} for group in groups[: self._groups])
        self._lines.append("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


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

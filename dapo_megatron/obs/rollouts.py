"""What the model wrote, for reading: a few groups of every step as JSON lines."""

from __future__ import annotations

import json
import os
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
        self._path, self._groups, self._decode = path, groups, decode
        path.touch()

    def write(self, step: int, groups: Sequence[Group]) -> None:
        """Append a step, whole or not at all.

        Raises:
            OSError: where it cannot be written.
        """
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            # Model output may hold halves of surrogate pairs, which have no bytes in UTF-8: JSON spells them \ud83d.
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                for group in groups[: self._groups]:
                    file.write(json.dumps({"step": step, **_plain(group, self._decode)}, ensure_ascii=False) + "\n")
        except OSError:
            os.truncate(self._path, size)
            raise


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

"""The section of held-out prompts: which there are, and how they are sampled and graded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, model_validator

from dapo_megatron.config.rollout import DataConfig, Template
from dapo_megatron.config.section import FilePattern, Fraction, NonNegativeInt, PositiveInt, Section, Temperature

RuleName = Literal["dapo", "lenient", "math_verify"]

HELD_OUT = "held-out"
"""What the set of eval.data is called."""
DIFFER = ".differ"
"""How no set's name ends: SET.differ.jsonl is a file beside SET.jsonl."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def is_set_name(name: str) -> bool:
    """Whether one of several sets can have this name."""
    return bool(_NAME.fullmatch(name)) and name != HELD_OUT and not name.endswith(DIFFER)


def _set_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"a set's name is that of files: A-Z, a-z, 0-9, and behind the first '.', '_' and '-', too; got {name!r}"
        )
    return name


SetName = Annotated[str, AfterValidator(_set_name)]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A set of held-out prompts, with everything that its own section leaves out."""

    name: str
    source: str
    """Where its prompts are, as in data.train."""
    data: DataConfig
    """How they are read."""
    every: int
    """Rollout steps between evaluations; 0 for none between the first step and the last."""
    samples: int
    """Responses per prompt."""
    temperature: float
    top_p: float
    rule: RuleName

    @property
    def metrics(self) -> str:
        """What the names of its metrics begin with: `eval/`, or `eval/NAME/` where sets have names."""
        return "eval/" if self.name == HELD_OUT else f"eval/{self.name}/"

    def due(self, step: int) -> bool:
        """Return whether to evaluate after `step` steps are done."""
        return self.every > 0 and step % self.every == 0


class EvalSetConfig(Section):
    """One of several sets. What is null is as eval, or data, has it."""

    data: FilePattern
    """Held-out prompts, read like data.train. A row is a problem: none may be there twice."""
    every: NonNegativeInt | None = None
    """Rollout steps between evaluations of this set."""
    samples: PositiveInt | None = None
    """Responses per prompt."""
    temperature: Temperature | None = None
    """Sampling temperature."""
    top_p: Fraction | None = None
    """Nucleus sampling."""
    rule: RuleName | None = None
    """How its answers are judged."""
    prompt_field: str | None = None
    """Where its rows keep the question."""
    answer_field: str | None = None
    """Where its rows keep the gold answer."""
    template: Template | None = None
    """Text around the question."""


class EvalConfig(Section):
    data: FilePattern | None = None
    """Held-out prompts, read like data.train; null leaves evaluation out, unless there are sets."""
    every: NonNegativeInt = 0
    """Rollout steps between evaluations; 0 evaluates only before the first step and after the last."""
    samples: PositiveInt = 1
    """Responses per prompt; the accuracy is their mean."""
    temperature: Temperature = 1.0
    """Sampling temperature; 0 is greedy, and what lies between 0 and 0.01 is not to be had."""
    top_p: Fraction = 1.0
    """Nucleus sampling; 1 is off. The paper's evaluation used 0.7."""
    rule: RuleName | None = None
    """How answers are judged; null is reward.rule."""
    sets: dict[SetName, EvalSetConfig] = {}
    """Several sets in place of eval.data, by name. What one leaves out is as eval has it, or data."""

    @model_validator(mode="after")
    def _one_set_or_several(self) -> EvalConfig:
        if self.data is not None and self.sets:
            raise ValueError(
                f"data is one set, and sets are several ({', '.join(self.sets)}); make it one of them, or set "
                f"data=null, or sets={{}}"
            )
        if HELD_OUT in self.sets:
            raise ValueError(f"sets.{HELD_OUT}: this is what the set of data is called; choose another name")
        for name in self.sets:
            if name.endswith(DIFFER):
                raise ValueError(
                    f"sets.{name}: {name}.jsonl is the file of what rules do not agree on in set "
                    f"{name.removesuffix(DIFFER)}; choose a name that does not end in {DIFFER}"
                )
        return self

    def held_out(self, data: DataConfig, rule: RuleName) -> dict[str, HeldOut]:
        """Return all sets by their names, in the order of the config.

        Args:
            data: how prompts are read where a set does not say.
            rule: how answers are judged where nothing here says.
        """
        sets = self.sets if self.data is None else {HELD_OUT: EvalSetConfig(data=self.data)}
        return {name: self._filled(name, its, data, rule) for name, its in sets.items()}

    def _filled(self, name: str, its: EvalSetConfig, data: DataConfig, rule: RuleName) -> HeldOut:
        fields = ("prompt_field", "answer_field", "template")
        own = {field: value for field in fields if (value := getattr(its, field)) is not None}
        return HeldOut(
            name=name,
            source=its.data,
            data=data.model_copy(update=own),
            every=self.every if its.every is None else its.every,
            samples=its.samples or self.samples,
            temperature=self.temperature if its.temperature is None else its.temperature,
            top_p=its.top_p or self.top_p,
            rule=its.rule or self.rule or rule,
        )

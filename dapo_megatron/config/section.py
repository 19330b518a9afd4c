"""What the sections of a configuration share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]


def _warm_or_greedy(temperature: float) -> float:
    if 0 < temperature < 0.01:
        raise ValueError(f"{temperature:g} is between 0 and 0.01, and vLLM would sample at 0.01 without a word")
    return temperature


Temperature = Annotated[float, Field(ge=0), AfterValidator(_warm_or_greedy)]


def _from_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from error


# A shell leaves the ~ of section.key=~/x alone, and YAML knows none.
FilePath = Annotated[Path, AfterValidator(_from_home)]
FilePattern = Annotated[str, AfterValidator(os.path.expanduser)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @classmethod
    def key_types(cls) -> dict[str, Any]:
        """Return key -> type for every key that the section has, its sections included."""
        return {name: info.annotation for name, info in cls.model_fields.items()}

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false for numbers and text: pydantic would take true for 1."""
        kind = cls.model_fields[info.field_name or ""].annotation
        if value is False and "off" in get_args(kind):
            return "off"  # which YAML reads as false
        plain = not (isinstance(kind, type) and issubclass(kind, BaseModel))
        if isinstance(value, bool) and plain and bool not in (kind, *get_args(kind)):
            raise ValueError(f"{str(value).lower()} is for switches, and this is none")
        return value

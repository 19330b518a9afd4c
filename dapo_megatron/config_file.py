"""Reads a configuration: YAML, then `section.key=value` overrides, then the checks of `config`.

A file may say `base: OTHER.yaml`, relative to its own folder: then it holds only what it has different from that one.

Every failure is a `ConfigError` that names the key, what was given and what would be right.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from dapo_megatron.config import Config
from dapo_megatron.config.section import Section
from dapo_megatron.errors import ConfigError


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path` and apply `overrides`, each of the form `section.key=value` with a YAML value.

    Raises:
        ConfigError: for a file that is not there or not YAML, a `base` that leads back to the file, an unknown key, a
            wrong type, sizes that do not fit.
    """
    values = _read(path)
    for override in overrides:
        _apply(values, override)
    return parse(values)


def schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration file."""
    whole = Config.model_json_schema()
    whole["anyOf"] = [{"required": ["base"]}, {"required": whole.pop("required")}]
    described = "File, relative to this one's folder, whose values hold where this one has none of its own."
    whole["properties"] = {"base": {"type": "string", "description": described}, **whole["properties"]}
    return whole


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the values of a file, laid over those of its `base`.

    Args:
        above: the files that have led to this one.
    """
    if path in above:
        raise ConfigError(f"base leads back to where it began: {' -> '.join(map(str, (*above, path)))}")
    named = f"the base {path} of {above[-1]}" if above else f"the config {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {named}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {named}: {error}; write it in UTF-8") from error
    values = _yaml(text, str(path))
    if values is None:
        raise ConfigError(f"{path} is empty: expected sections such as model: and data:")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections such as model: and data:, got {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base = {base!r}; give the name of a file, relative to {path.parent}")
    return _over(_read(Path(os.path.normpath(path.parent / base)), (*above, path)), values)


def _over(under: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `values` over those of a base: sections key by key, anything else as a whole; null takes a section away."""
    for key, value in values.items():
        below = under.get(key)
        if isinstance(below, dict) and value is None:
            del under[key]
        else:
            under[key] = _over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return under


def parse(values: Mapping[str, Any]) -> Config:
    """Validate nested plain values.

    Raises:
        ConfigError: as `load`.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(issue) for issue in error.errors())) from error


def dump(config: Config) -> str:
    """Return the resolved configuration as YAML; `load` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except _NoTextError as error:
        raise ConfigError(f"{where}, {error.place}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {_in_a_line(error)}") from error


def _in_a_line(error: yaml.YAMLError) -> str:
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    if not isinstance(error, yaml.MarkedYAMLError) or not mark:
        return " ".join(str(error).split())
    return (
        f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}; put quotes around text that has blanks, "
        f"brackets, braces or colons, and on a command line around the whole override"
    )


class _NoTextError(yaml.MarkedYAMLError):
    """A key that YAML does not read as text."""

    def __init__(self, key: Any, node: yaml.Node) -> None:
        mark, written = node.start_mark, (isinstance(node, yaml.ScalarNode) and node.value) or key
        self.place = f"line {mark.line + 1}, column {mark.column + 1}"
        super().__init__(
            problem=f"{written} is no key: YAML reads it as {type(key).__name__}, and keys are text such as model",
            problem_mark=mark,
        )


class _Loader(yaml.SafeLoader):
    """Reads 1e-6 as a number, which YAML 1.1 takes for text, and refuses a key that is no text or there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if not isinstance(key, str):
                raise _NoTextError(key, node.value[index][0])
            if key in keys[:index]:
                raise yaml.MarkedYAMLError(
                    problem=f"{key!r} is there twice; the second would replace the first",
                    problem_mark=node.value[index][0].start_mark,
                )
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    *parents, last = key.split(".")
    node = values
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a section")
        node = child
    where = f"override {override!r}"
    node[last] = _yaml(text, where)
    if rest := _comment(text):
        raise ConfigError(
            f"{where}: YAML takes {rest!r} for a comment; leave it out, or put quotes around the whole value: "
            f"'{key}=\"...\"'"
        )


def _comment(text: str) -> str:
    """Return the comment behind a value."""
    node = yaml.compose(text, _Loader)
    rest = text[node.end_mark.index if node else 0 :].strip()
    return rest if rest.startswith("#") else ""


_OF_A_NAME = "[key]"
"""What pydantic puts behind the place of a name that is not one."""


def _explain(issue: Any) -> str:
    location = [part for part in issue["loc"] if isinstance(part, str) and part != _OF_A_NAME]
    key = ".".join(location)
    given = issue.get("input")
    match issue["type"]:
        case "extra_forbidden":
            return _unknown_key(location)
        case "missing" if isinstance(issue["loc"][-1], int):
            return f"{key}: value {issue['loc'][-1] + 1} of the list is missing"
        case "missing":
            return f"{key} is missing, and it has no default"
        case "string_type" | "path_type" if isinstance(given, dict):
            return f"{key} = {given!r}: braces or a colon make a mapping; put quotes around the text: '{key}=\"...\"'"
        case "string_type" | "path_type" if isinstance(given, bool | int | float | date):
            kind = type(given).__name__
            return f"{key} = {given!r}: YAML reads this as {kind}; put quotes around the text: '{key}=\"...\"'"
        case "tuple_type" | "list_type":
            return f"{key} = {given!r}: write a list, such as [{given}]"
        case "model_type":
            return f"{key} = {given!r}: {key} is a section, with the keys {', '.join(sorted(_fields(location)))}"
        case "value_error":
            message = str(issue["ctx"]["error"])
            return f"{key}: {message}" if key else message
        case _:
            return f"{key} = {given!r}: {issue['msg'][0].lower()}{issue['msg'][1:]}"


def _unknown_key(location: list[str]) -> str:
    *parents, last = location
    known = _fields(parents)
    section = ".".join(parents)
    message = f"unknown key {'.'.join(location)}"
    if location == ["parallel", "dp"]:
        return f"{message}; data parallel is what is left: ranks / (tp x pp x cp). Choose the ranks (launch.processes)"
    if place := _all_keys().get(last):
        return f"{message}; did you mean {place}?"
    if near := difflib.get_close_matches(last, known, n=1, cutoff=0.75):
        return f"{message}; did you mean {'.'.join([*parents, near[0]])}?"
    if elsewhere := difflib.get_close_matches(last, _all_keys(), n=1, cutoff=0.85):
        return f"{message}; did you mean {_all_keys()[elsewhere[0]]}?"
    return f"{message}; {section or 'the top level'} knows {', '.join(sorted(known))}" if known else message


def _fields(parents: Sequence[str]) -> dict[str, Any]:
    """Return key -> type in the section at `parents`; empty for the section of a loss that is not known by name."""
    kind: Any = Config
    for parent in parents:
        if get_origin(kind) is dict:  # of sections, by names that are the user's
            kind = get_args(kind)[1]
            continue
        annotation = kind.key_types().get(parent)
        if annotation is None:
            return {}
        kinds = (annotation, *get_args(annotation))
        kind = next(kind for kind in kinds if isinstance(kind, type) or get_origin(kind) is dict)
    return {} if get_origin(kind) is dict else kind.key_types()


def _all_keys(section: type[Section] = Config, prefix: str = "") -> dict[str, str]:
    """Return the last part of every key -> the whole key."""
    keys: dict[str, str] = {}
    for name, annotation in section.key_types().items():
        keys.setdefault(name, prefix + name)
        if isinstance(annotation, type) and issubclass(annotation, Section):
            keys = {**_all_keys(annotation, f"{prefix}{name}."), **keys}
    return keys

"""The command lines of the conversion tools: those of `tools/`, and `dapo-megatron convert` and `inspect`."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dapo_megatron.config import ParallelConfig
from dapo_megatron.errors import ConfigError
from dapo_megatron.signals import end_when_interrupted, exit_when_ended, raise_when_interrupted

_CONVERT_CODES = (
    "Exit codes: 0 done, 1 it failed, or --verify found a difference, 2 input that cannot work (nothing was written), "
    "129, 130 and 143 ended by SIGHUP, Ctrl-C or SIGTERM (nothing is left of OUT). docs/checkpoints.md, "
    '"Converting", has more.'
)
_INSPECT_CODES = (
    "Exit codes: 0 whole, as far as was looked, 1 something is missing or damaged, 2 no checkpoint, 130 interrupted. "
    'docs/checkpoints.md, "Converting", has more.'
)
_DTYPES = ("float32", "bfloat16", "float16")
_SIZES = {"tp": "tensor-parallel", "pp": "pipeline-parallel", "vpp": "virtual pipeline", "ep": "expert-parallel"}


def add_convert(parser: argparse.ArgumentParser, *, to: str | None = None) -> None:
    """Add what a conversion wants.

    Args:
        to: megatron or hf; None where the input decides.
    """
    source = {"megatron": "HF_DIR", "hf": "CHECKPOINT", None: "SOURCE"}[to]
    parser.add_argument("source", metavar=source, type=path_argument, help="the folder of the checkpoint, or of a run")
    parser.add_argument("target", metavar="OUT", type=path_argument, help="folder to write, which must not be there")
    if to != "hf":
        only = "" if to else " (to Megatron)"
        for name, what in _SIZES.items():
            parser.add_argument(f"--{name}", type=int, help=f"{what} size that is written{only}; any other can load it")
    if to != "megatron":
        parser.add_argument(
            "--hf-files",
            metavar="DIR",
            type=path_argument,
            help="config.json, tokenizer and the like, for a checkpoint without an hf/ folder",
        )
    parser.add_argument("--dtype", choices=_DTYPES, help="cast the weights; default: keep what each has")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the result again: every tensor by hash, and logits against transformers'",
    )
    parser.epilog = _CONVERT_CODES
    parser.set_defaults(run=_convert, to=to, **dict.fromkeys(_SIZES))
    if to == "megatron":
        parser.set_defaults(hf_files=None)


def path_argument(text: str) -> Path:
    """Return the path of an argument, and refuse what a shell has made nothing of."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty, as a shell variable that is not set; give a folder")
    if text.startswith("~"):
        name = text.partition("/")[0]
        raise argparse.ArgumentTypeError(
            f"the shell has not expanded {name} in {text!r}, which is in quotes, behind a =, or names no user; give "
            "the whole path, or put ./ before it where a folder is called so"
        )
    return Path(text)


def add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="PATH", type=path_argument, help="the folder of a checkpoint, of whatever kind, or a run"
    )
    parser.add_argument(
        "--hashes",
        action="store_true",
        help="read every file of a run's checkpoint and compare its SHA-256 with the manifest's; default: sizes",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.epilog = _INSPECT_CODES
    parser.set_defaults(run=_inspect)


def hf_to_megatron(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Convert a Hugging Face checkpoint to Megatron's torch_dist format.", allow_abbrev=False
    )
    add_convert(parser, to="megatron")
    return _answer(parser.parse_args(argv))


def megatron_to_hf(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Convert a Megatron checkpoint (torch_dist) to Hugging Face's format.", allow_abbrev=False
    )
    add_convert(parser, to="hf")
    return _answer(parser.parse_args(argv))


def inspect_checkpoint(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Tell what a checkpoint holds, and what is missing, without loading it.", allow_abbrev=False
    )
    add_inspect(parser)
    return _answer(parser.parse_args(argv))


def _answer(arguments: argparse.Namespace) -> int:
    from dapo_megatron.cli import answered

    return answered(lambda: arguments.run(arguments))


def _convert(arguments: argparse.Namespace) -> int:
    _prepare()
    end_when_interrupted()
    from dapo_megatron.convert.logits import compare_logits
    from dapo_megatron.convert.output import warnings_about
    from dapo_megatron.convert.places import resolve
    from dapo_megatron.convert.run_checkpoint import refuse_damaged
    from dapo_megatron.convert.to_hf import megatron_to_hf, side_folder
    from dapo_megatron.convert.to_megatron import hf_to_megatron
    from dapo_megatron.convert.verify import compare_tensors

    raise_when_interrupted()
    source, target, dtype, begun = arguments.source, arguments.target, arguments.dtype, time.monotonic()
    place = resolve(source)
    _check_direction(arguments, is_megatron=place.is_megatron)
    if source.resolve() in target.resolve().parents:
        raise ConfigError(f"{target} lies in {source}, which is only read; give an OUT elsewhere")
    if place.of_run:
        refuse_damaged(place.of_run)
    for problem in place.problems:
        _say(f"warning: {problem}; {place.folder} is taken")
    sides = side_folder(place, arguments.hf_files) if place.is_megatron else place.folder
    for warning in warnings_about(sides):
        _say(warning)
    if place.is_megatron:
        said = megatron_to_hf(place, target, dtype, arguments.hf_files, sys.stderr)
        pair = (place.folder, sides, target)
    else:
        said = hf_to_megatron(place.folder, target, _parallel(arguments), dtype, sys.stderr)
        pair = (target, target / "hf", place.folder)
    for sentence in [*said, f"wrote {target} in {time.monotonic() - begun:.0f} s"]:
        _say(sentence)
    if arguments.verify:
        _say(compare_tensors(*pair, dtype, sys.stderr))
        if dtype:
            _say("logits are not compared: a cast changes them")
        else:
            _say(compare_logits(pair[0], pair[2]))
    return 0


def _check_direction(arguments: argparse.Namespace, *, is_megatron: bool) -> None:
    is_a, wanted = ("Megatron", "hf") if is_megatron else ("Hugging Face", "megatron")
    if arguments.to not in (None, wanted):
        tool = "megatron_to_hf" if is_megatron else "hf_to_megatron"
        raise ConfigError(f"{arguments.source} is a {is_a} checkpoint already; {tool}.py converts those")
    if is_megatron and (given := [name for name in _SIZES if getattr(arguments, name) is not None]):
        raise ConfigError(f"--{given[0]} is for writing Megatron's format, but {arguments.source} is in it already")
    if not is_megatron and arguments.hf_files is not None:
        raise ConfigError(f"--hf-files is for Megatron checkpoints, but {arguments.source} is Hugging Face's")


def _parallel(arguments: argparse.Namespace) -> ParallelConfig:
    sizes: dict[str, Any] = {name: 1 if (size := getattr(arguments, name)) is None else size for name in _SIZES}
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"--{name} {size}: at least 1 is needed")
    if sizes["vpp"] > 1 and sizes["pp"] == 1:
        raise ConfigError(
            f"--vpp {sizes['vpp']} splits pipeline stages into chunks, but --pp is 1; give --pp 2 or more"
        )
    return ParallelConfig(**sizes)


def _prepare() -> None:
    """Before torch is imported."""
    import logging
    import warnings

    # Nothing here runs on a GPU, and a process that sees none makes the same model on every machine.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # What libraries lack on this machine is no news to a person who converts.
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    exit_when_ended()


def _inspect(arguments: argparse.Namespace) -> int:
    end_when_interrupted()
    from dapo_megatron.cli import tell
    from dapo_megatron.convert.describe import describe
    from dapo_megatron.convert.describe_text import as_text
    from dapo_megatron.obs.terminal import printable

    raise_when_interrupted()
    found = describe(arguments.path, sys.stderr if arguments.hashes else None)
    if arguments.json:
        tell(json.dumps(found, indent=1))
    else:
        if isinstance(sys.stdout, io.TextIOWrapper):  # names in letters that it has none for are spelled, as on stderr
            sys.stdout.reconfigure(errors="backslashreplace")
        tell(printable(as_text(found)))
    return 1 if found["missing"] else 0


def _say(sentence: str) -> None:
    from dapo_megatron.obs.terminal import printable

    print(printable(sentence), file=sys.stderr, flush=True)

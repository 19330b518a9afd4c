"""The command line: `dapo-megatron prepare|train|eval|engines|check-reduction|convert|inspect|config`, or
`-m dapo_megatron`.

Exit codes: those of `EXIT_CODES`, and 141 where the reader of the output went away.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from dapo_megatron import __version__, config_file
from dapo_megatron.config import Config
from dapo_megatron.convert.main import add_convert, add_inspect
from dapo_megatron.errors import ConfigError, DapoError
from dapo_megatron.prepare.main import DESCRIPTION as PREPARE
from dapo_megatron.prepare.main import add_prepare
from dapo_megatron.signals import INTERRUPTED, Insistence, exit_when_ended, heeded, raise_when_interrupted

if TYPE_CHECKING:
    from dapo_megatron.eval.report import Told

_SAME_SECONDS = 1.5
"""Within which the same signal is the same request: longer than for a rank, to which these are passed on."""

EXIT_CODES = """\
exit codes: 0 done, 1 the run failed, 2 input that cannot work (nothing was started), 75 stopped and saved (started
again, it goes on), 129 the terminal was closed (SIGHUP) and nothing saved, 130 interrupted, 143 stopped and not saved
"""
EXAMPLES = """\
examples:
  dapo-megatron prepare data --languages en --config CONFIG    get and clean data sets (docs/data.md)
  dapo-megatron train configs/quickstart_cpu.yaml
  dapo-megatron train configs/quickstart_cpu.yaml train.steps=50 run.name=longer optimizer.lr=1e-5
  dapo-megatron train --resume configs/quickstart_cpu.yaml    go on from the last checkpoint, or begin
  dapo-megatron eval configs/quickstart_cpu.yaml --model runs/quickstart eval.samples=4
  dapo-megatron eval --compare runs/quickstart-eval/base runs/quickstart-eval/quickstart
  dapo-megatron eval --responses responses.jsonl        grade what is there, by the published and the lenient rule
  dapo-megatron engines configs/quickstart_cpu.yaml engine.host=10.0.0.2    engines here, for a run elsewhere
  dapo-megatron check-reduction configs/quickstart_cpu.yaml    every layout gives the gradient of a single process
  dapo-megatron check-reduction configs/quickstart_cpu.yaml algo.loss_scope=prompt --layouts yours,tp2xcp2+sp
  dapo-megatron convert Qwen2.5-7B Qwen2.5-7B-megatron --tp 2    Hugging Face to Megatron, or back
  dapo-megatron inspect runs/quickstart                 what a checkpoint holds, and what is missing
  dapo-megatron config configs/quickstart_cpu.yaml      the configuration with every default filled in
  dapo-megatron config --schema                         every key, its type, default and meaning, as JSON schema

"""


def main(argv: Sequence[str] | None = None) -> int:
    # A loss or an engine of the user's own is found in the working directory, as it is under `python -m` and torchrun.
    sys.path.append(str(Path.cwd()))
    parser = _parser()
    # Overrides may stand on either side of an option.
    arguments, more = parser.parse_known_args(argv)
    if more and not ("overrides" in arguments and all("=" in word and word[0] != "-" for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    elif more:
        arguments.overrides += more
    return answered(lambda: arguments.run(arguments))


def answered(run: Callable[[], int]) -> int:
    """Return the exit code of what `run` does; what it raises for people is told on standard error."""
    try:
        raise_when_interrupted()
        return run()
    except DapoError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has seen enough; what was left to say, such as FAIL, is unsaid
        _drop(1)
        return 128 + signal.SIGPIPE


def tell(text: str) -> None:
    """Print what a program or a person has asked for to standard output; letters that it lacks as escapes.

    Raises:
        DapoError: where it cannot be written there, such as on a full disk.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop(1)
        raise DapoError(f"cannot write to standard output: {error.strerror}") from error


def _drop(descriptor: int) -> None:
    """Have what is still to be written to standard output (1) or error (2), also at the process's end, go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="dapo-megatron",
        description="Reinforcement learning of reasoning models with DAPO: Megatron-core actor, vLLM rollout.",
        epilog=EXAMPLES + EXIT_CODES,
        formatter_class=raw,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dapo-megatron {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add_prepare(commands.add_parser("prepare", help="get and clean data sets", description=PREPARE, allow_abbrev=False))

    train = commands.add_parser(
        "train",
        help="train a model",
        description="Check the configuration, then start launch.processes ranks on this machine and train. On several "
        "machines, start `-m dapo_megatron.train CONFIG ...` with torchrun instead.",
        epilog=EXIT_CODES + "\ndocs/checkpoints.md has what is saved, and how a run is stopped and goes on.",
        formatter_class=raw,
        allow_abbrev=False,
    )
    _add_config(train)
    train.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in the folder from its last checkpoint, or begin it: run.existing=resume",
    )
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "eval",
        help="measure a model on held-out prompts",
        description="Sample and grade responses to the held-out prompts of CONFIG (eval.data, or eval.sets) with the "
        "model in model.path, in an output folder; started again, it goes on there. A table goes to standard error, "
        "JSON to standard output. Or compare two such folders, or grade responses that are there: then a table goes "
        "to standard output. docs/evaluation.md says what the numbers mean.",
        epilog=EXIT_CODES,
        formatter_class=raw,
        allow_abbrev=False,
    )
    _add_config(evaluate, optional=True)
    evaluate.add_argument(
        "--model",
        metavar="DIR",
        type=Path,
        help="a Hugging Face checkpoint, or the folder of a run or of its checkpoint; default: model.path of CONFIG",
    )
    evaluate.add_argument("--out", metavar="DIR", type=Path, help="the output folder; default: run.dir/NAME-eval/MODEL")
    evaluate.add_argument(
        "--compare",
        metavar=("A", "B"),
        nargs=2,
        type=Path,
        help="compare two output folders, problem by problem; needs no CONFIG",
    )
    evaluate.add_argument(
        "--responses",
        metavar="FILE",
        type=Path,
        help='grade the responses in a .jsonl file, rows {"uid", "answer", "responses": [text, ...]}; needs no CONFIG',
    )
    evaluate.add_argument("--json", action="store_true", help="JSON instead of a table, to standard output")
    evaluate.set_defaults(run=_evaluate, usage_error=evaluate.error)

    engines = commands.add_parser(
        "engines",
        help="start engines for a run on another machine",
        description="Start engine.count engines on this machine, at engine.host, and keep them: Ctrl-C or SIGTERM ends "
        "them, and when one fails, all end with its reason. Their URLs go to standard output once they answer; the run "
        "gets them as engine.urls, with engine.placement=external. docs/engines.md has tokens, ports and more.",
        allow_abbrev=False,
    )
    _add_config(engines)
    engines.set_defaults(run=_engines)

    check = commands.add_parser(
        "check-reduction",
        help="show that the gradient does not depend on the layout",
        description="Train a miniature of the model, with the loss and optimizer of CONFIG, in one layout after the "
        "other: real Megatron ranks on this machine, mini-batches split in several ways, masks, a rank without tokens. "
        "Each gradient is compared with Hugging Face's in float64. Exit code 1 where one differs.",
        allow_abbrev=False,
    )
    _add_config(check)
    check.add_argument(
        "--layouts",
        metavar="A,B",
        type=lambda text: text.split(","),
        help="standard ones (a wrong name lists them), or yours, which is that of CONFIG made to fit; "
        "default: yours and all 16 standard ones",
    )
    check.add_argument(
        "--processes", type=int, metavar="N", help="ranks at the most; default: the number of GPUs, or 4 without any"
    )
    check.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on GPUs, float32 without any"
    )
    check.add_argument("--verbose", action="store_true", help="a row for every split, not only for the worst")
    check.set_defaults(run=_check_reduction)

    convert = commands.add_parser(
        "convert",
        help="convert a Hugging Face checkpoint to Megatron's format, or back",
        description="Convert a Hugging Face checkpoint to Megatron's torch_dist format, or such a checkpoint, a run's "
        "for example, to Hugging Face's: what SOURCE is decides.",
        allow_abbrev=False,
    )
    add_convert(convert)

    inspect = commands.add_parser(
        "inspect",
        help="tell what a checkpoint holds",
        description="Tell what a checkpoint holds, and what is missing (exit code 1), without loading it.",
        allow_abbrev=False,
    )
    add_inspect(inspect)

    config = commands.add_parser(
        "config",
        help="print the resolved configuration, or the schema of all keys",
        description="Print the configuration as YAML with every default filled in.",
        allow_abbrev=False,
    )
    config.add_argument("--schema", action="store_true", help="print the JSON schema of all keys instead")
    _add_config(config, optional=True)
    config.set_defaults(run=_config, usage_error=config.error)
    return parser


def _add_config(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    parser.add_argument("config", metavar="CONFIG", type=Path, nargs="?" if optional else None, help="a YAML file")
    parser.add_argument(
        "overrides", metavar="section.key=value", nargs="*", help="values that replace those of the file"
    )


def _config(arguments: argparse.Namespace) -> int:
    if arguments.schema:
        tell(json.dumps(config_file.schema(), indent=1))
        return 0
    path: Path | None = arguments.config
    if path is None:
        return arguments.usage_error("give a CONFIG, or --schema")
    text = config_file.dump(config_file.load(path, arguments.overrides)).removesuffix("\n")
    if isinstance(sys.stdout, io.TextIOWrapper):  # as a config is read, whatever letters the terminal has
        sys.stdout.reconfigure(encoding="utf-8")
    tell(text)
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from dapo_megatron.obs.run_folder import nothing_to_do

    overrides = [*arguments.overrides, *(["run.existing=resume"] if arguments.resume else [])]
    config = config_file.load(arguments.config, overrides)
    if over := nothing_to_do(config):
        tell("\n".join(f"dapo-megatron: {line}" for line in over))
        return 0
    ranks = config.launch.processes
    tell(f"dapo-megatron: {_check(config, ranks)}")
    _set_threads(config.launch.threads)
    return _launch(ranks, ["dapo_megatron.train", str(arguments.config), *overrides])


def _check(config: Config, ranks: int) -> str:
    """What will run, in a line. The prompts are let go: the leader reads its own, and says what is worth a warning."""
    from dapo_megatron.preflight import preflight

    checked, parallel = preflight(config, ranks), config.parallel
    held_out = sum(map(len, checked.held_out.values()))
    return (
        f"{len(checked.train):,} prompts, {held_out:,} held out; {ranks} ranks = tp({parallel.tp}) x "
        f"pp({parallel.pp}) x cp({parallel.cp}) x dp({parallel.data_parallel(ranks)})"
    )


def _set_threads(threads: int) -> None:
    """The config decides on the number, the environment on the rest."""
    # torch takes the number of MKL's threads where one is given.
    os.environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    # Ranks and engines take turns on the same cores: threads that spin while they wait would stop the others.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KMP_BLOCKTIME", "0")


def _launch(ranks: int, module: Sequence[str]) -> int:
    """torchrun in this process: ranks report errors themselves, so its own account of them is left out."""
    import logging

    import psutil
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)
    # Ranks that are to end at once close within 10 seconds; what is left is stopped, and only SIGKILL ends it.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "12")
    # Not torchrun's to handle: it would give the ranks no longer than that, and keep their exit code to itself.
    insistence = Insistence(_SAME_SECONDS)

    def pass_on(number: int, frame: FrameType | None) -> None:
        ranks = psutil.Process().children()
        if insistence.insists(number) or not ranks:
            raise SignalException(f"signal {number}", signal.Signals(number))  # torchrun ends all ranks
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    for number in heeded():
        signal.signal(number, pass_on)
    options = ["--standalone", "--nproc-per-node", str(ranks), "--signals-to-handle", "SIGQUIT", "--module"]
    try:
        torchrun.run(torchrun.parse_args([*options, *module]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            return _fail(f"rank {rank} was ended by {name}; where memory is short, the system does that", 1)
        return failure.exitcode
    except SignalException as error:
        return INTERRUPTED if error.sigval == signal.SIGINT else 128 + error.sigval
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    given = [arguments.config is not None, arguments.compare is not None, arguments.responses is not None]
    if sum(given) != 1:
        return arguments.usage_error("give a CONFIG, or --compare A B, or --responses FILE: one of them")
    if arguments.config is None and (arguments.model or arguments.out):
        return arguments.usage_error("--model and --out go with a CONFIG")
    from dapo_megatron.obs.terminal import printable

    if arguments.config is not None:
        told = _measure(arguments)
        print(printable(told.table), file=sys.stderr, flush=True)
    else:
        told = _graded(arguments.responses) if arguments.responses else _compared(*arguments.compare)
        if not arguments.json:
            tell(printable(told.table))
            return 0
    tell(json.dumps(told.results, indent=1, allow_nan=False))
    return 0


def _measure(arguments: argparse.Namespace) -> Told:
    from dapo_megatron.eval_command import evaluate_model, find_model, output_folder
    from dapo_megatron.preflight import preflight_eval

    overrides = list(arguments.overrides)
    if arguments.model:
        overrides.append(f"model.path={json.dumps(str(find_model(arguments.model)), ensure_ascii=False)}")
    config = config_file.load(arguments.config, overrides)
    checked = preflight_eval(config)
    for warning in checked.warnings:
        _say(f"warning: {warning}")
    return evaluate_model(config, checked, arguments.out or output_folder(config), _say)


def _graded(path: Path) -> Told:
    from dapo_megatron.responses import grade_file

    return grade_file(path)


def _compared(first: Path, second: Path) -> Told:
    from dapo_megatron.eval.compare import compare_folders

    return compare_folders(first, second)


def _engines(arguments: argparse.Namespace) -> int:
    from dapo_megatron.serve import serve

    # The others are for the run.
    here = ["engine.placement=split", "engine.urls=[]", "engine.kinds=[]", "engine.nodes=[0]", "engine.sleep=null"]
    serve(config_file.load(arguments.config, [*arguments.overrides, *here]), tell, _say)
    return 0


def _check_reduction(arguments: argparse.Namespace) -> int:
    from dapo_megatron.check_reduction.check import check_reduction

    if arguments.processes is not None and arguments.processes < 1:
        raise ConfigError(f"--processes {arguments.processes}: at least one process is needed")
    config = config_file.load(arguments.config, arguments.overrides)
    exit_when_ended()
    agree = check_reduction(
        config,
        arguments.layouts,
        processes=arguments.processes,
        dtype=arguments.dtype,
        verbose=arguments.verbose,
    )
    return 0 if agree else 1


def _fail(message: str, code: int) -> int:
    _say(message if code == INTERRUPTED else f"error: {message}")
    return code


def _say(message: str) -> None:
    from dapo_megatron.obs.terminal import printable

    try:
        print(f"dapo-megatron: {printable(message)}", file=sys.stderr, flush=True)
    except OSError:  # on a full disk, the exit code is all that can be told
        _drop(2)

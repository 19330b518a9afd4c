"""The command line: `dapo-megatron train|eval|config`, also as `python -m dapo_megatron`.

Exit codes: 0 done, 1 the run failed, 2 input that cannot work (nothing was started then), 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dapo_megatron import __version__, config_file
from dapo_megatron.config import Config, RunConfig
from dapo_megatron.errors import ConfigError, DapoError

if TYPE_CHECKING:
    from dapo_megatron.eval.evaluate import EvalResult
    from dapo_megatron.preflight import Checked

INTERRUPTED = 130

EXAMPLES = """\
examples:
  dapo-megatron train configs/quickstart_cpu.yaml
  dapo-megatron train configs/quickstart_cpu.yaml train.steps=50 run.name=longer optimizer.lr=1e-5
  dapo-megatron eval configs/quickstart_cpu.yaml eval.samples=4 model.path=runs/quickstart/hf
  dapo-megatron config configs/quickstart_cpu.yaml      the configuration with every default filled in
  dapo-megatron config --schema                         every key, its type, default and meaning, as JSON schema

exit codes: 0 done, 1 the run failed, 2 input that cannot work (nothing was started), 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except DapoError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="dapo-megatron",
        description="Reinforcement learning of reasoning models with DAPO: Megatron-core actor, vLLM rollout.",
        epilog=EXAMPLES,
        formatter_class=raw,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dapo-megatron {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a model",
        description="Check the configuration, then start launch.processes ranks on this machine and train. On several "
        "machines, start `-m dapo_megatron.train CONFIG ...` with torchrun instead.",
        formatter_class=raw,
        allow_abbrev=False,
    )
    _add_config(train)
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "eval",
        help="measure a model on held-out prompts",
        description="Sample eval.samples responses to every prompt of eval.data with the model in model.path and grade "
        "them. A table goes to standard error, JSON to standard output.",
        allow_abbrev=False,
    )
    _add_config(evaluate)
    evaluate.set_defaults(run=_evaluate)

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
        print(json.dumps(Config.model_json_schema(), indent=1))
        return 0
    path: Path | None = arguments.config
    if path is None:
        return arguments.usage_error("give a CONFIG, or --schema")
    print(config_file.dump(config_file.load(path, arguments.overrides)), end="", flush=True)
    return 0


def _train(arguments: argparse.Namespace) -> int:
    config = config_file.load(arguments.config, arguments.overrides)
    ranks = config.launch.processes
    checked = _preflight(config, ranks)
    print(
        f"dapo-megatron: {checked.train_prompts:,} prompts, {checked.eval_prompts:,} held out; {ranks} ranks = "
        f"tp({config.parallel.tp}) x pp({config.parallel.pp}) x cp({config.parallel.cp}) x dp({checked.data_parallel})",
        flush=True,
    )
    for name, value in _thread_settings(config.launch.threads).items():
        os.environ.setdefault(name, value)
    return _launch(ranks, ["dapo_megatron.train", str(arguments.config), *arguments.overrides])


def _preflight(config: Config, world_size: int) -> Checked:
    from dapo_megatron.preflight import preflight

    return preflight(config, world_size)


def _thread_settings(threads: int) -> dict[str, str]:
    """Ranks and engines take turns on the same cores: threads that spin while they wait would stop the others."""
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}


def _launch(ranks: int, module: Sequence[str]) -> int:
    """torchrun in this process: ranks report errors themselves, so its own account of them is left out."""
    import logging

    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)
    options = ["--standalone", "--nproc-per-node", str(ranks), "--module"]
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
    from dataclasses import asdict
    from tempfile import TemporaryDirectory

    config = config_file.load(arguments.config, arguments.overrides)
    source = config.eval.data
    if source is None:
        raise ConfigError("eval.data is null: there is nothing to evaluate on; set eval.data=FILE")
    with TemporaryDirectory(prefix="dapo-megatron-eval-") as folder:
        # The engine's log is all that goes to the run folder.
        config = config.model_copy(update={"run": RunConfig(dir=Path(folder), name="eval", tensorboard=False)})
        checked = _preflight(config, config.parallel.model_size)
        print(
            f"dapo-megatron: {checked.eval_prompts:,} prompts x {config.eval.samples} responses; starting engines ...",
            file=sys.stderr,
            flush=True,
        )
        result = _measure(config, source)
    row = asdict(result)
    for name, value in row.items():
        if name != "examples":
            print(f"{name:>16}  {value}", file=sys.stderr)
    print(json.dumps(row, indent=1))
    return 0


def _measure(config: Config, source: str) -> EvalResult:
    from contextlib import ExitStack, closing

    from dapo_megatron.data.prompts import load_prompts
    from dapo_megatron.data.tokenizer import decoder, end_token_ids, load_tokenizer
    from dapo_megatron.eval.evaluate import evaluate
    from dapo_megatron.reward.judge import Judge
    from dapo_megatron.rollout.engines import Engines

    max_tokens = config.rollout.max_response_tokens
    tokenizer = load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    ends = end_token_ids(tokenizer, config.rollout.stop_token_ids)
    prompts = load_prompts(config.data, tokenizer, source)

    with ExitStack() as stack:
        judge = stack.enter_context(closing(Judge(config.reward, max_tokens)))
        engines = stack.enter_context(closing(Engines(config, config.run.folder, decoder(tokenizer))))
        engines.wait_ready()
        work = evaluate(engines, prompts, judge, config.eval, max_tokens=max_tokens, stop_token_ids=ends)
        return engines.run(work)


def _fail(message: str, code: int) -> int:
    print(f"dapo-megatron: error: {message}" if code != INTERRUPTED else f"dapo-megatron: {message}", file=sys.stderr)
    return code

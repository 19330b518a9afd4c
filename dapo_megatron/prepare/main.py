"""The command line of `tools/prepare_data.py`, and of `dapo-megatron prepare`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapo_megatron.convert.main import path_argument
from dapo_megatron.errors import ConfigError, DapoError
from dapo_megatron.prepare.sets import SETS, TEMPLATE
from dapo_megatron.signals import end_when_interrupted, exit_when_ended, raise_when_interrupted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dapo_megatron.config import DataConfig

DESCRIPTION = (
    "Get data sets from the Hugging Face hub, or from files, leave out what should not be trained on, and write "
    "parquet files for data.train and eval.data, with a data card: counts, hashes, licences. A set is one of "
    f"{', '.join(SETS)} (@REVISION after it for another than the newest), hub:OWNER/NAME:FILES[@REVISION], or a "
    ".parquet or .jsonl file."
)
_CODES = (
    "Exit codes: 0 done, 1 the hub cannot be reached or the disk takes no more, 2 input that cannot work, 129, 130 and "
    "143 ended by SIGHUP, Ctrl-C or SIGTERM. Where it is not 0, nothing is left of OUT, except where only "
    "printing failed: then it is complete. Started again, it does all but downloads anew. docs/data.md has more."
)
_TRAIN = "dapo-math-17k"
_EVAL = "aime-2024,aime-2025,amc-2023,math-500,gsm8k-test"
_NGRAM = 8
_SHARE = 0.4
_MAX_TOKENS = 2048


def add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="OUT", type=path_argument, help="folder to write, which must not be there")
    parser.add_argument(
        "--train", metavar="A,B", default=_TRAIN, help="sets to train on, together; default: %(default)s"
    )
    parser.add_argument(
        "--eval",
        metavar="A,B",
        default=_EVAL,
        help="sets to evaluate on, each by itself; none leaves them out; default: %(default)s",
    )
    parser.add_argument(
        "--from",
        dest="folder",
        metavar="DIR",
        type=path_argument,
        help="take named sets from files in DIR, and use no network",
    )
    parser.add_argument(
        "--languages", metavar="en,zh", help="keep training problems in these languages only; default: all"
    )
    parser.add_argument(
        "--ngram",
        metavar="N",
        type=int,
        default=_NGRAM,
        help="compare training with evaluation problems by runs of N words; default: %(default)s",
    )
    parser.add_argument(
        "--overlap",
        metavar="SHARE",
        type=float,
        default=_SHARE,
        help="leave out training problems that have this share of the runs of an evaluation problem; 1 keeps all but "
        "those that have every run; default: %(default)s",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        type=path_argument,
        help="the folder of the model, to leave out prompts that are too long; default: lengths do not matter",
    )
    parser.add_argument(
        "--max-tokens", metavar="N", type=int, help=f"with a tokenizer: tokens of a prompt; default: {_MAX_TOKENS}"
    )
    parser.add_argument(
        "--config",
        metavar="CONFIG",
        type=path_argument,
        help="the configuration to train with: its data.template and data.chat_template, model.path as the tokenizer, "
        "data.max_prompt_tokens as the limit; default: DAPO's template in the chat template",
    )
    parser.add_argument(
        "--prompt-field", metavar="NAME", help="of sets without a name: where the problem is, with dots into objects"
    )
    parser.add_argument("--answer-field", metavar="NAME", help="of sets without a name: where the answer is")
    parser.epilog = _CODES
    parser.set_defaults(run=_prepare)


def prepare_data(argv: Sequence[str] | None = None) -> int:
    from dapo_megatron.cli import answered

    parser = argparse.ArgumentParser(description=DESCRIPTION, allow_abbrev=False)
    add_prepare(parser)
    arguments = parser.parse_args(argv)
    return answered(lambda: arguments.run(arguments))


def _prepare(arguments: argparse.Namespace) -> int:
    end_when_interrupted()
    from dapo_megatron.cli import tell
    from dapo_megatron.prepare.output import README, config_lines
    from dapo_megatron.prepare.prepare import Plan, prepare
    from dapo_megatron.prepare.rows import Fields

    if arguments.folder and not arguments.folder.is_dir():
        raise ConfigError(f"--from {arguments.folder}: no such folder")
    if arguments.ngram < 1:
        raise ConfigError(f"--ngram {arguments.ngram}: a run has at least 1 word")
    if not 0 < arguments.overlap <= 1:
        raise ConfigError(f"--overlap {arguments.overlap:g}: a share is above 0 and at most 1")
    prompt, tokenizer = _prompt(arguments)
    raise_when_interrupted()
    exit_when_ended()
    plan = Plan(
        train=_words(arguments.train, "--train"),
        evaluation=[] if arguments.eval == "none" else _words(arguments.eval, "--eval"),
        folder=arguments.folder,
        fields=Fields(arguments.prompt_field, arguments.answer_field),
        languages=_words(arguments.languages, "--languages") if arguments.languages is not None else None,
        ngram=arguments.ngram,
        share=arguments.overlap,
        prompt=prompt,
        tokenizer=tokenizer,
    )
    card = prepare(plan, arguments.target, _say)
    _say(f"wrote {arguments.target}; to train on it:")
    try:
        tell(config_lines(arguments.target, card).removesuffix("\n"))
    except DapoError as error:
        raise DapoError(
            f"{error}; {arguments.target} is complete, and {README} in it says how to train on it"
        ) from error
    return 0


def _words(text: str, option: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise ConfigError(f"{option} {text!r}: between commas there is nothing; write it like a,b")
    return list(dict.fromkeys(words))


def _prompt(arguments: argparse.Namespace) -> tuple[DataConfig, PreTrainedTokenizerBase | None]:
    """How training makes prompts, and the tokenizer to count with, if any."""
    from dapo_megatron import config_file
    from dapo_megatron.config import DataConfig

    folder: Path | None = arguments.tokenizer
    limit: int | None = arguments.max_tokens
    if limit is not None and limit < 1:
        raise ConfigError(f"--max-tokens {limit}: at least 1 is needed")
    own_code = False
    values: dict[str, Any] = {"train": "train.parquet", "template": TEMPLATE, "chat_template": True}
    if arguments.config:
        config = config_file.load(arguments.config)
        for field, wanted in (("prompt_field", "prompt"), ("answer_field", "answer")):
            if (got := getattr(config.data, field)) != wanted:
                raise ConfigError(
                    f"{arguments.config} has data.{field}={got}, but the files have {wanted!r}: leave it away"
                )
        folder, limit = folder or config.model.path, limit or config.data.max_prompt_tokens
        own_code = config.model.trust_remote_code and folder == config.model.path
        values |= {"template": config.data.template, "chat_template": config.data.chat_template}
    if limit is not None and folder is None:
        raise ConfigError(f"--max-tokens {limit} needs a tokenizer to count with: give --tokenizer DIR")
    prompt = DataConfig(**values, max_prompt_tokens=_MAX_TOKENS if limit is None else limit)
    if folder is None:
        return prompt, None
    from dapo_megatron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder, trust_remote_code=own_code)
    if prompt.chat_template and not tokenizer.chat_template and not arguments.config:
        raise ConfigError(
            f"--tokenizer {folder} has no chat template, and DAPO's prompts are counted in one; give --config CONFIG "
            "with data.chat_template=false, and the data.template that you train with"
        )
    return prompt, tokenizer


def _say(sentence: str) -> None:
    from dapo_megatron.obs.terminal import printable

    print(printable(sentence), file=sys.stderr, flush=True)

"""Seconds and memory of whole DAPO steps on one GPU that a rank and a vLLM engine share.

    python -m benchmarks.gpu_rollout

A model of Qwen2.5-0.5B's shape with random weights answers sums: 512 responses of 512 tokens a step, as it knows no
end. Rollout, log-probs, four updates, and the weights' way back to the engine are a run of `dapo-megatron train`; what
it measured is read from its metrics, without the first step. Half of the step's time is the most that anything but the
rollout should take (target).

On a machine without a GPU, `--shape tiny` shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from benchmarks.gpu_shapes import SHAPES, card, verdict
from dapo_megatron.obs.metrics import PHASES
from examples.quickstart import sums

ROOT = Path(__file__).parents[1]
GROUPS, RESPONSES = 32, 16
MAX_SHARE = 0.5
"""Of a step's time for all that is not rollout."""


def save_model(folder: Path, shape: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape, eos_token_id=None, bos_token_id=None))
    model.to(torch.bfloat16).save_pretrained(folder)
    sums.tokenizer().save_pretrained(folder)


def train(folder: Path, arguments: argparse.Namespace, *, sleep: bool = False) -> list[dict[str, float]]:
    """Run it, with its output shown, and return the metrics of its steps.

    Args:
        sleep: as engine.sleep; otherwise the engine keeps its share of the card.
    """
    config = {
        "model": {"path": str(folder / "model"), "dtype": "bfloat16", "layers": arguments.layers},
        "data": {"train": str(folder / "train.jsonl"), "max_prompt_tokens": 32},
        "engine": {"placement": "colocated", "sleep": sleep},
        "rollout": {
            "prompts": GROUPS,
            "responses": RESPONSES,
            "max_response_tokens": arguments.length,
            "dynamic_sampling": False,
        },
        "reward": {"overlong": {"cache": arguments.length // 4}},
        "train": {
            "steps": arguments.steps,
            "mini_batch": GROUPS * RESPONSES // 4,
            "micro_batch_tokens": 32 * (32 + arguments.length),
        },
        "memory": {"offload": arguments.offload},
        "run": {"dir": str(folder), "name": "run", "tensorboard": False, "save_hf": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "dapo_megatron", "train", str(folder / "config.yaml")]
    if code := subprocess.call(command, cwd=ROOT):
        for log in sorted((folder / "run").glob("*.log")):
            print(f"--- {log.name}\n{log.read_text()[-3_000:]}")
        sys.exit(f"the run ended with exit code {code}")
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def middle(rows: Sequence[dict[str, float]], name: str) -> float:
    """Return the median over the steps but the first."""
    return median(row[name] for row in rows[1:])


def describe(rows: Sequence[dict[str, float]]) -> None:
    """Print seconds and memory by phase, and how far engine and trainer are apart."""

    def by_phase(kind: str, form: str) -> str:
        there = (phase for phase in PHASES if f"{kind}/{phase}" in rows[0])
        return ", ".join(f"{phase} {form.format(middle(rows, f'{kind}/{phase}'))}" for phase in there)

    print(f"{card()}: {middle(rows, 'seconds/step'):.2f} s a step: {by_phase('seconds', '{:.2f}')}")
    peaks = by_phase("memory", "{:.2f}")
    print(f"rollout: {middle(rows, 'tokens_per_second'):,.0f} tokens/s; peak GiB of the rank: {peaks}")
    if "memory/device" in rows[0]:
        print(f"in use on the card, the engine included: at most {middle(rows, 'memory/device'):.1f} GiB")
    mean, largest = middle(rows, "mismatch/abs"), middle(rows, "mismatch/abs_max")
    print(f"engine and trainer differ by {mean:.1e} nats a token, at most {largest:.1e}")


def report(rows: Sequence[dict[str, float]]) -> bool:
    describe(rows)
    if not torch.cuda.is_available():
        print("(targets are for GPUs)")
        return True
    share = 1 - middle(rows, "seconds/rollout") / middle(rows, "seconds/step")
    return verdict(f"{share:.0%} of a step is not rollout, at most {MAX_SHARE:.0%}", share <= MAX_SHARE)


def parse(doc: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--layers", choices=["transformer_engine", "torch"], help="as model.layers")
    parser.add_argument("--length", type=int, default=512, help="tokens of a response")
    parser.add_argument("--offload", nargs="*", help="as memory.offload")
    parser.add_argument("--steps", type=int, default=4)
    return parser.parse_args()


@contextmanager
def material(arguments: argparse.Namespace) -> Iterator[Path]:
    """A folder with the model and what it is trained on, as `train` wants it."""
    with tempfile.TemporaryDirectory(prefix="dapo-megatron-rollout-") as name:
        folder = Path(name)
        save_model(folder / "model", SHAPES[arguments.shape])
        sums.write(folder / "train.jsonl", sums.split(seed=0, held_out=8, train=256)[1])
        yield folder


def main() -> None:
    arguments = parse(__doc__)
    with material(arguments) as folder:
        rows = train(folder, arguments)
    sys.exit(0 if report(rows) else 1)


if __name__ == "__main__":
    main()

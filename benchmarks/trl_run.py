"""DAPO by TRL's GRPOTrainer on the quick-start's problem; prints seconds per rollout step as one JSON line.

Runs in TRL's own environment, started by `against_trl.py`: `trl_run.py FOLDER STEPS SEED`, FOLDER being the
quick-start's base model and data. As close to configs/quickstart_cpu.yaml as TRL allows; it has no dynamic sampling.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports] in its own environment

from dapo_megatron.reward.math import grade
from dapo_megatron.reward.overlong import soft_punishment

PROMPTS, RESPONSES, MINI_BATCH, MAX_TOKENS, CACHE = 32, 16, 128, 64, 16
UPDATES = PROMPTS * RESPONSES // MINI_BATCH


class Clock(TrainerCallback):
    """Notes when every optimizer step ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())


def reward(completions: list[str], answer: list[str], completion_ids: list[list[int]], **_) -> list[float]:
    return [
        (1.0 if grade(text, gold, "dapo").correct else -1.0) + soft_punishment(len(ids), MAX_TOKENS, CACHE)
        for text, gold, ids in zip(completions, answer, completion_ids, strict=True)
    ]


def main(folder: Path, steps: int, seed: int) -> None:
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            output_dir=scratch,
            use_cpu=True,
            bf16=False,
            seed=seed,
            learning_rate=1e-4,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5 * UPDATES,
            weight_decay=0.0,
            max_grad_norm=1.0,
            max_steps=steps * UPDATES,
            per_device_train_batch_size=MINI_BATCH,
            steps_per_generation=UPDATES,
            num_generations=RESPONSES,
            max_completion_length=MAX_TOKENS,
            temperature=1.0,
            loss_type="dapo",
            epsilon=0.2,
            epsilon_high=0.28,
            beta=0.0,
            gradient_checkpointing=False,
            logging_steps=UPDATES,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=load_dataset("json", data_files=str(folder / "train.jsonl"), split="train"),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    ends = clock.times[::UPDATES]
    history = [row for row in trainer.state.log_history if "reward" in row]
    print(
        json.dumps(
            {
                "seconds": [b - a for a, b in pairwise(ends)],
                "reward": [row["reward"] for row in history],
                "length": [row["completions/mean_length"] for row in history],
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

"""DAPO by TRL's GRPOTrainer on a problem of `problems.py`; prints seconds and lengths of rollout steps as a JSON line.

    python -m benchmarks.trl_run PROBLEM trl|trl-vllm STEPS SEED

Runs in TRL's own environment, started by `against_trl.py`. As close to our side's configuration as TRL allows; it has
no dynamic sampling. `trl` samples with transformers, `trl-vllm` with vLLM in the trainer's process
(`vllm_mode="colocate"`), whose weights are pushed by `push` below, not by TRL.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports] in its own environment

from benchmarks.problems import PROBLEMS, Problem
from dapo_megatron.reward.math import grade
from dapo_megatron.reward.overlong import soft_punishment


class Clock(TrainerCallback):
    """Notes when every optimizer step ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())


def push(generation: Any) -> None:
    """Replaces `VLLMGeneration.sync_weights`, which fails on CPU: it hands vLLM's model one tensor at a time, but there
    the layers hold packed copies of their weights. vLLM's reload unpacks a layer, loads it and packs it again.
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    runner = generation.llm.llm_engine.model_executor.driver_worker.model_runner
    initialize_layerwise_reload(runner.model)
    runner.model.load_weights(generation._iter_named_params())
    finalize_layerwise_reload(runner.model, runner.model_config)
    if runner.model_config.hf_text_config.tie_word_embeddings:
        # It shares the embedding's tensor, so nothing is loaded into it, but its packed copy has to be made again.
        head = runner.model.lm_head
        head.quant_method.process_weights_after_loading(head)
    generation.llm.reset_prefix_cache()


def run(problem: Problem, steps: int, seed: int, *, vllm: bool) -> dict[str, list[float]]:
    def reward(completions: list[str], answer: list[str], completion_ids: list[list[int]], **_) -> list[float]:
        return [
            (1.0 if grade(text, gold, "dapo").correct else -1.0)
            + soft_punishment(len(ids), problem.response_tokens, problem.cache)
            for text, gold, ids in zip(completions, answer, completion_ids, strict=True)
        ]

    tokenizer = AutoTokenizer.from_pretrained(problem.folder / "base")
    model = AutoModelForCausalLM.from_pretrained(problem.folder / "base", dtype=torch.float32)
    accumulation = problem.mini_batch // problem.trl_batch
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            output_dir=scratch,
            use_cpu=True,
            bf16=False,
            seed=seed,
            learning_rate=problem.lr,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5 * problem.updates,
            weight_decay=0.0,
            max_grad_norm=1.0,
            max_steps=steps * problem.updates,
            per_device_train_batch_size=problem.trl_batch,
            gradient_accumulation_steps=accumulation,
            steps_per_generation=problem.updates * accumulation,
            num_generations=problem.responses,
            max_completion_length=problem.response_tokens,
            temperature=1.0,
            loss_type="dapo",
            epsilon=0.2,
            epsilon_high=0.28,
            beta=0.0,
            gradient_checkpointing=False,
            use_transformers_continuous_batching=problem.continuous_batching and not vllm,
            use_vllm=vllm,
            vllm_mode="colocate",
            vllm_max_model_length=problem.prompt_tokens + problem.response_tokens,
            # Ours measures it, and corrects nothing.
            vllm_importance_sampling_correction=False,
            logging_steps=problem.updates,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=load_dataset("json", data_files=str(problem.folder / "train.jsonl"), split="train"),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    ends = clock.times[:: problem.updates]
    return {
        "seconds": [b - a for a, b in pairwise(ends)],
        "length": [row["completions/mean_length"] for row in trainer.state.log_history if "reward" in row],
    }


def main() -> None:
    name, peer, steps, seed = sys.argv[1:]
    if peer == "trl-vllm":
        from trl.generation import vllm_generation  # pyright: ignore[reportMissingImports] in its own environment

        # TRL leaves the dtype to vLLM, which would take bfloat16.
        vllm_generation.LLM = partial(vllm_generation.LLM, dtype="float32")
        vllm_generation.VLLMGeneration.sync_weights = push
    print(json.dumps(run(PROBLEMS[name], int(steps), int(seed), vllm=peer == "trl-vllm")))


if __name__ == "__main__":
    main()

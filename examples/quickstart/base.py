"""Trains the base model of the quick-start by supervised steps, through the same actor that DAPO uses.

Run on every rank: `torchrun --nproc-per-node 2 -m examples.quickstart.base FOLDER SEED`. Leaves in FOLDER a Hugging
Face checkpoint `base/`, `train.jsonl`, `heldout.jsonl`, and `base.json`: what it was made from, and the seconds.
"""

from __future__ import annotations

import json
import random
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import track
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from dapo_megatron.actor import topology
from dapo_megatron.actor.actor import Actor
from dapo_megatron.config_file import parse
from dapo_megatron.pack import pack
from dapo_megatron.types import MicroBatch, TokenLoss, TrainSample
from dapo_megatron.weights.hf import HfCheckpoint
from examples.quickstart import sums
from examples.quickstart.recipe import BATCH, HELD_OUT_PROBLEMS, RATE, RECIPE, STEPS, TRAIN_PROBLEMS, WARMUP


def untrained(seed: int) -> Qwen2ForCausalLM:
    """A Qwen2 of 0.8M parameters."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=32,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            eos_token_id=sums.VOCABULARY.index(sums.END),
            pad_token_id=sums.VOCABULARY.index(sums.END),
        )
    )


def likelihood(logprobs_T: torch.Tensor, batch: MicroBatch, *_: object) -> TokenLoss:
    """The loss of supervised training: minus the log-probs of the loss tokens, summed."""
    mask_T = batch.loss_mask_T
    return TokenLoss(-torch.where(mask_T, logprobs_T, 0).sum(), mask_T.sum())


def batches(problems: list[sums.Numbers], tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[list[TrainSample]]:
    """Endless batches of demonstrations, the same on every rank."""
    rng = random.Random(seed)
    end = tokenizer.eos_token_id
    while True:
        batch = []
        for index in range(BATCH):
            numbers = rng.choice(problems)
            prompt = tokenizer.encode(sums.question(numbers))
            response = [*tokenizer.encode(sums.demonstration(numbers, rng)), end]
            tokens = torch.tensor(prompt + response, dtype=torch.int32)
            batch.append(
                TrainSample(
                    token_ids=tokens,
                    loss_mask=torch.arange(len(tokens)) >= len(prompt),
                    rollout_logprobs=torch.zeros(len(tokens)),
                    advantage=0.0,
                    group=index,
                )
            )
        yield batch


def rate(step: int) -> float:
    """Linear warm-up, then linear decay to a tenth."""
    return RATE * min(1.0, (step + 1) / WARMUP) * max(0.1, 1 - step / STEPS)


def main(folder: Path, seed: int) -> None:
    started = time.monotonic()
    warnings.simplefilter("ignore")
    disable_progress_bar()
    config = parse(
        {
            # Exact enough for every machine: Transformer Engine's packed attention has no float32.
            "model": {"path": str(folder / "untrained"), "dtype": "float32", "layers": "torch"},
            "data": {"train": str(folder / "train.jsonl"), "max_prompt_tokens": 16},
            "rollout": {"max_response_tokens": 64},
            "reward": {"overlong": {"cache": 16}},
            "train": {"micro_batch_tokens": 8192},
            "optimizer": {"weight_decay": 0.01},
        }
    )
    topo = topology.initialize(config.parallel)
    held_out, problems = sums.split(seed, HELD_OUT_PROBLEMS, TRAIN_PROBLEMS)
    tokenizer = sums.tokenizer()
    if topo.is_leader:
        folder.mkdir(parents=True, exist_ok=True)
        sums.write(folder / "heldout.jsonl", held_out)
        sums.write(folder / "train.jsonl", problems)
        untrained(seed).save_pretrained(folder / "untrained")
        tokenizer.save_pretrained(folder / "untrained")
    topo.broadcast(None)

    checkpoint = HfCheckpoint(config.model.path)
    actor = Actor(config, topo, checkpoint)
    demonstrations = batches(problems, tokenizer, seed)
    for step in track(range(STEPS), description="Training the base model", disable=not topo.is_leader):
        packed = pack(
            next(demonstrations),
            mini_batch=BATCH,
            micro_batch_tokens=config.train.micro_batch_tokens,
            replicas=topo.dp,
            seed=f"{seed}:{step}",
        )
        (update,) = packed.share(topo.dp_rank).mini_batches()
        result = actor.update(update, likelihood, lr=rate(step))
        if topo.is_leader and (step + 1) % 100 == 0:
            print(f"  step {step + 1}: {result['loss']:.4f} nats per token", flush=True)
    checkpoint.save(actor.chunks, folder / "base")
    if topo.is_leader:
        made_from = {**RECIPE, "seed": seed, "seconds": round(time.monotonic() - started, 1)}
        (folder / "base.json").write_text(json.dumps(made_from, indent=1) + "\n")
    topology.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

"""The recipes in configs/: what they say, that their layouts fit, and that each runs with a tiny model in its place."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.fake_memory import CARD, RESERVE
from dapo_megatron import config_file
from dapo_megatron.actor.topology import Topology
from dapo_megatron.config import Config
from dapo_megatron.preflight import preflight
from dapo_megatron.prepare.sets import TEMPLATE
from dapo_megatron.rollout.place import place
from dapo_megatron.train import learning_rate
from dapo_megatron.types import Completion, FinishReason, MiniBatch, Prompt
from tests.helpers import recipe
from tests.helpers.answers import END, save_answering, stop_tokens, tokenizer, write_problems
from tests.helpers.checkpoint import write_checkpoint
from tests.helpers.completions import completion
from tests.helpers.fake_costs import SIZES, fake, without_gpus
from tests.helpers.mini_run import Step, mini_run

CONFIGS = recipe.ROOT / "configs"
PUBLISHED = "qwen2.5_32b_aime"
MODELS: dict[str, dict[str, Any]] = {
    PUBLISHED: SIZES["32B"],
    f"{PUBLISHED}_no_dynamic_sampling": SIZES["32B"],
    f"{PUBLISHED}_sample_loss": SIZES["32B"],
    f"{PUBLISHED}_grpo": SIZES["32B"],
    "qwen2.5_7b_math": SIZES["7B"] | {"max_position_embeddings": 32_768, "rope_theta": 1e4},
    "qwen2.5_0.5b_gsm8k": SIZES["7B"]
    | {
        "hidden_size": 896,
        "intermediate_size": 4_864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
}
"""Recipe -> config.json of its model."""
RANKS = {"qwen2.5_7b_math": 8, "qwen2.5_0.5b_gsm8k": 1}
"""128 for the others."""
DAILY = (PUBLISHED, f"{PUBLISHED}_sample_loss", "qwen2.5_0.5b_gsm8k")
"""These differ most."""


def load(name: str, *overrides: str) -> Config:
    return config_file.load(CONFIGS / f"{name}.yaml", overrides)


def test_no_recipe_is_forgotten() -> None:
    assert {path.stem for path in CONFIGS.glob("qwen*.yaml")} == set(MODELS)


def test_the_docs_have_the_table_of_the_file() -> None:
    table = recipe.table(recipe.read())
    assert table in (recipe.ROOT / "docs/reproduction.md").read_text(encoding="utf-8"), (
        f"put this table into docs/reproduction.md (python -m tests.helpers.recipe):\n{table}"
    )


def test_what_is_not_as_published_says_why() -> None:
    values = recipe.read()
    assert {value.key for value in values if value.differs} >= {"optimizer.warmup_steps", "algo.dapo.dual_clip"}
    assert not [value.key for value in values if value.differs and not value.remark]


def test_a_recipe_in_which_a_value_is_changed_is_found_out(tmp_path: Path) -> None:
    path = tmp_path / "changed.yaml"
    text = recipe.RECIPE.read_text(encoding="utf-8")
    path.write_text(text.replace("clip_high: 0.28 ", "clip_high: 0.3 ").replace("responses: 16 ", "responses: 8 "))
    differing = [value.key for value in recipe.read(path) if value.differs and not value.remark]
    assert differing == ["rollout.responses", "algo.dapo.clip_high"]


def test_numbers_that_follow_from_the_recipe() -> None:
    config = load(PUBLISHED)
    updates = config.rollout.batch_size // config.train.mini_batch
    assert (config.rollout.batch_size, updates, config.train.steps * updates) == (8_192, 16, 5_280)
    assert config.rollout.max_response_tokens - config.reward.overlong.cache == 16_384
    assert [learning_rate(config.optimizer, step) for step in (0, 8, 9, 329)] == pytest.approx([1e-7, 9e-7, 1e-6, 1e-6])
    assert config.data.template == TEMPLATE


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for key, value in values.items():
        keys |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return keys


@pytest.mark.parametrize(
    ("name", "base", "differences"),
    [
        ("no_dynamic_sampling", "", {"rollout.dynamic_sampling": False, "rollout.generation_batch": None}),
        ("sample_loss", "_no_dynamic_sampling", {"algo.loss_scope": "sample"}),
        (
            "grpo",
            "_sample_loss",
            {"reward.overlong.punishment": False, "algo.dapo.clip_high": 0.2, "algo.dapo.dual_clip": None},
        ),
    ],
)
def test_a_variant_differs_in_what_its_name_says(name: str, base: str, differences: dict[str, Any]) -> None:
    one, other = (
        flat(load(f"{PUBLISHED}{suffix}", "run.name=x").model_dump(mode="json")) for suffix in (base, f"_{name}")
    )
    assert {key: other[key] for key in other if other[key] != one[key]} == differences


def places(name: str, folder: Path) -> list[str]:
    """The overrides that have a recipe read what there is in `folder`."""
    held_out = [f"eval.sets.{one}.data" for one in load(name).eval.sets] or ["eval.data"]
    return [
        f"model.path={folder / 'model'}",
        f"data.train={folder / 'train.jsonl'}",
        *(f"{key}={folder / 'held_out.jsonl'}" for key in held_out),
        f"run.dir={folder / 'runs'}",
        stop_tokens(),
    ]


@pytest.mark.parametrize("name", MODELS)
def test_every_check_before_a_run_is_passed(name: str, tmp_path: Path) -> None:
    """With the model's config.json, and neither its weights nor its GPUs."""
    write_checkpoint(tmp_path / "model", **{"head_dim": None, **MODELS[name]})
    tokenizer().save_pretrained(tmp_path / "model")
    write_problems(tmp_path / "train.jsonl", [0, 1])
    write_problems(tmp_path / "held_out.jsonl", [1])
    ranks = RANKS.get(name, 128)
    checked = preflight(load(name, *places(name, tmp_path)), ranks, local_ranks=min(ranks, 8))
    assert checked.train[0].text.startswith("<|im_start|>user\n") and "What is 0 + 0 - 0?" in checked.train[0].text
    assert checked.train[0].text.endswith("<|im_start|>assistant\n")
    assert not checked.warnings


def numbers(size: dict[str, Any]) -> tuple[float, int]:
    """Of a model: its parameters, but for biases and norms, and what a token has in the KV cache."""
    hidden, layers = size["hidden_size"], size["num_hidden_layers"]
    keys = hidden // size["num_attention_heads"] * size["num_key_value_heads"]
    layer = 2 * hidden * (hidden + keys) + 3 * hidden * size["intermediate_size"]
    embeddings = (1 if size["tie_word_embeddings"] else 2) * size["vocab_size"] * hidden
    return layers * layer + embeddings, layers * 2 * keys


@pytest.mark.parametrize("name", [PUBLISHED, "qwen2.5_7b_math", "qwen2.5_0.5b_gsm8k"])
def test_a_gpu_of_80_gb_holds_the_actors_weights_and_the_longest_sequences(name: str) -> None:
    """vLLM starts only where its cache holds one; the actor's weights are there as well when an engine gets them."""
    config, ranks = load(name), RANKS.get(name, 128)
    parallel, engine = config.parallel, config.engine
    parameters, cached = numbers(MODELS[name])
    share = place(config, 0, 8000, ranks=min(ranks, 8)).memory_fraction * CARD
    cache = share - 2 * parameters / engine.tensor_parallel
    assert cache > 4 * 2 * cached / engine.tensor_parallel * config.max_sequence_tokens
    replicas = parallel.data_parallel(ranks)
    state = parameters / parallel.tp * (2 + 4 + 12 / replicas)
    assert 2 * parameters / parallel.tp + share + RESERVE < CARD and state + RESERVE < CARD
    if name == PUBLISHED:
        assert (replicas, round(parameters / 1e9, 1), round(state / 2**30)) == (16, 32.8, 26)


@pytest.mark.long
def test_a_rank_of_32b_has_what_the_recipe_says() -> None:
    config = load(PUBLISHED)
    with without_gpus():
        cost = fake("32B", config, 128, 0, (4_096,) * (config.train.micro_batch_tokens // 4_096))
    assert round(cost.peak_bytes / 2**30) == 31


SMALL = [
    *("model.dtype=float32", "parallel.tp=1", "parallel.sequence_parallel=false", "launch.processes=1"),
    *("rollout.prompts=4", "rollout.responses=4", "rollout.max_response_tokens=48", "reward.overlong.cache=16"),
    *("reward.workers=1", "train.mini_batch=8", "train.micro_batch_tokens=4096", "run.tensorboard=false"),
    *("engine.count=1", "engine.tensor_parallel=1"),
]
CAP, CACHE = 48, 16
LENGTHS = (8, 40, 12, CAP)
"""Of the four responses to a prompt; the second is punished by a half, the last is truncated, and punished by 1."""
PUNISHMENTS = (0.0, -0.5, 0.0, -1.0)


def small(name: str, *overrides: str) -> list[str]:
    """What makes a recipe fit a tiny model and two CPU cores; loss, sampling and reward stay what they are."""
    drawn = ["rollout.generation_batch=6"] if load(name).rollout.generation_batch else []
    return [*SMALL, *drawn, *overrides]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    save_answering(folder / "model")
    write_problems(folder / "train.jsonl", [0, 1] * 6)
    write_problems(folder / "held_out.jsonl", [0, 1])
    return folder


def right_responses(prompt: Prompt) -> int:
    """How many of the four are right: of four prompts, all, none, and for two of them some."""
    return (4, 0, 1, 3)[int(prompt.uid.rpartition(":")[2]) % 4]


def script(config: Config) -> Callable[[Prompt, int], list[Completion]]:
    vocabulary = tokenizer().get_vocab()
    form = "\\boxed{%s}\n" if config.reward.rule == "math_verify" else "Answer: %s\n"
    filler, end = vocabulary["."], vocabulary[END]

    def respond(prompt: Prompt, n: int) -> list[Completion]:
        assert n == 4
        responses = []
        for index, length in enumerate(LENGTHS):
            stated = int(prompt.answer) if index < right_responses(prompt) else 1 - int(prompt.answer)
            answer = [vocabulary[form % stated]]
            if length == CAP:
                responses.append(completion([filler] * (CAP - 1) + answer, finish=FinishReason.LENGTH))
            else:
                responses.append(completion([filler] * (length - 2) + answer + [end]))
        return responses

    return respond


def segments(mini_batch: MiniBatch) -> Iterator[tuple[int, float, float]]:
    """Of each response its loss tokens, its advantage, and the weight of each of its tokens."""
    for batch in mini_batch.micro_batches:
        ends = batch.cu_seqlens.tolist()
        for start, end in pairwise(ends):
            mask_L = batch.loss_mask_T[start:end]
            advantages, weights = batch.advantages_T[start:end][mask_L], batch.weights_T[start:end][mask_L]
            assert torch.all(advantages == advantages[0]) and torch.all(weights == weights[0])
            yield int(mask_L.sum()), float(advantages[0]), float(weights[0])


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        *(pytest.param(name, [], marks=[] if name in DAILY else pytest.mark.long) for name in MODELS),
        (f"{PUBLISHED}_grpo", ["algo.kl.coef=0.04"]),
    ],
)
def test_what_a_recipe_makes_of_responses(name: str, overrides: Sequence[str], material: Path, alone: Topology) -> None:
    """Sampling, reward, advantages, scope, rate and updates of each recipe, by hand; its responses are given."""
    config = load(name, *places(name, material), *small(name, *overrides), "train.steps=2")
    steps = mini_run(config, alone, preflight(config, 1), script(config), steps=2)
    shaped = config.reward.overlong.punishment
    assert shaped == (name not in (f"{PUBLISHED}_grpo", "qwen2.5_0.5b_gsm8k"))
    for number, step in enumerate(steps):
        groups = step.batch.rollout.groups
        assert len(groups) == 4
        if name == PUBLISHED:
            assert all(0 < sum(group.correct) < 4 for group in groups)
            assert step.batch.rollout.measures["groups/kept"].value == 4
        wanted = []
        for group in groups:
            right = right_responses(group.prompt)
            assert group.correct == tuple(index < right for index in range(4))
            rewards = [(1.0 if index < right else -1.0) + shaped * PUNISHMENTS[index] for index in range(4)]
            assert group.rewards == pytest.approx(rewards)
            wanted += list(zip(LENGTHS, advantages(rewards), strict=True))
        check_updates(config, number, step, wanted)
    if name != PUBLISHED:
        mixed = [0 < sum(group.correct) < 4 for step in steps for group in step.batch.rollout.groups]
        assert 0 < sum(mixed) < len(mixed), "every group is trained on"


def advantages(rewards: Sequence[float]) -> Sequence[float]:
    rewards_G = np.array(rewards)
    return ((rewards_G - rewards_G.mean()) / (rewards_G.std(ddof=1) + 1e-6)).tolist()


def check_updates(config: Config, number: int, step: Step, wanted: list[tuple[int, float]]) -> None:
    trained = [segment for mini_batch in step.mini_batches for segment in segments(mini_batch)]
    assert sorted((tokens, round(advantage, 5)) for tokens, advantage, _ in trained) == sorted(
        (tokens, round(advantage, 5)) for tokens, advantage in wanted
    )
    assert len(step.results) == 2 and not any(result.skipped for result in step.results)
    assert step.results[0]["ratio/mean"] == 1.0
    warmup = config.optimizer.warmup_steps
    assert step.results[0].lr == pytest.approx(1e-6 * ((number + 1) / warmup if warmup else 1))
    first = list(segments(step.mini_batches[0]))
    if config.algo.loss_scope == "sample":
        loss = -np.mean([advantage for _, advantage, _ in first])
    else:
        loss = -sum(tokens * advantage for tokens, advantage, _ in first) / sum(tokens for tokens, *_ in first)
    assert step.results[0]["loss"] == pytest.approx(loss, abs=1e-5)
    assert ("kl/ref" in step.results[0].measures) == (config.algo.kl.coef > 0)


@pytest.mark.vllm
@pytest.mark.multiproc
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == PUBLISHED else pytest.mark.long) for name in MODELS]
)
def test_a_recipe_runs_with_a_real_engine(name: str, material: Path, tmp_path: Path) -> None:
    overrides = [*places(name, material), *small(name), f"run.dir={tmp_path}", "run.name=run"]
    cheap = ["train.steps=1", "eval.samples=2", "eval.temperature=1.0", "run.save_hf=false"]
    command = [sys.executable, "-m", "dapo_megatron", "train", str(CONFIGS / f"{name}.yaml"), *overrides, *cheap]
    done = subprocess.run(command, cwd=recipe.ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (step,) = [row for row in rows if "loss" in row]
    assert step["groups/kept"] == 4 and step["grad_norm"] > 0 and step["mismatch/abs_max"] < 2e-5
    assert 0 < step["accuracy"] < 1
    accuracy = "eval/aime2024/accuracy" if load(name).eval.sets else "eval/accuracy"
    assert len([row for row in rows if accuracy in row]) == 2

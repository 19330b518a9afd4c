"""What is computed under fake tensors and fake groups, against formulas written by hand.

H hidden size, F of the MLP, V vocabulary with its padding, Q and K channels of all queries and of all keys, T slots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from dapo_megatron import config_file
from dapo_megatron.config import Config, MemoryConfig, OptimizerConfig, ParallelConfig
from tests.helpers.fake_costs import SIZES, SLOTS, fake, tiny_config, without_gpus
from tests.helpers.fake_mesh import RankCost


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[None]:
    with without_gpus():
        yield


def matrices(size: dict[str, Any], parallel: ParallelConfig, rank_stage: int) -> tuple[int, int]:
    """Weights of this stage's matrix products on a tensor-parallel rank: of its layers, and of the output layer."""
    hidden, layers = size["hidden_size"], size["num_hidden_layers"] // parallel.pp
    queries, keys = channels(size)
    layer = hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * size["intermediate_size"]
    last = rank_stage == parallel.pp - 1
    return layers * layer // parallel.tp, vocabulary(size, parallel) * hidden * last


def channels(size: dict[str, Any]) -> tuple[int, int]:
    width = size.get("head_dim", size["hidden_size"] // size["num_attention_heads"])
    return width * size["num_attention_heads"], width * size["num_key_value_heads"]


def vocabulary(size: dict[str, Any], parallel: ParallelConfig) -> int:
    """Rows of a tensor-parallel rank: a multiple of 16."""
    rows = -(-size["vocab_size"] // parallel.tp)
    return -(-rows // 16) * 16


def parameters(size: dict[str, Any], parallel: ParallelConfig, stage: int) -> int:
    hidden, layers = size["hidden_size"], size["num_hidden_layers"] // parallel.pp
    queries, keys = channels(size)
    biases = (queries + 2 * keys) // parallel.tp * (size["model_type"] == "qwen2")
    norms = 2 * hidden + 2 * size.get("head_dim", 0) * (size["model_type"] == "qwen3")
    biases_and_norms = layers * (biases + norms)
    embedding = vocabulary(size, parallel) * hidden * (stage == 0)
    final_norm = hidden * (stage == parallel.pp - 1)
    return sum(matrices(size, parallel, stage)) + biases_and_norms + embedding + final_norm


def check_formulas(size: str, config: Config, world_size: int, lengths: tuple[int, ...]) -> None:
    """Build the first and the last stage."""
    parallel = config.parallel
    data_ranks = world_size // (parallel.tp * parallel.pp)
    for stage in {0, parallel.pp - 1}:
        rank = 0 if stage == 0 else world_size - 1
        cost = fake(size, config, world_size, rank, lengths)
        count = parameters(SIZES[size], parallel, stage)
        assert cost.parameters == count
        # Megatron pads: every parameter to 64 numbers, and a bucket so that it divides over the replicas.
        assert 4 * count <= cost.gradient_bytes <= 4 * count * 1.001
        assert cost.parameter_bytes == cost.gradient_bytes // 2
        # A replica steps its part of every bucket, of which some is padding.
        share = cost.gradient_bytes // 4 / data_ranks
        assert 0.99 * share < cost.optimizer_bytes / 12 <= share
        # A checkpoint takes these slices from it, and nothing of other replicas.
        assert cost.saved_bytes == cost.optimizer_bytes and not cost.saving_collectives
        held = cost.parameter_bytes + cost.gradient_bytes + cost.optimizer_bytes // 3
        assert cost.state_bytes == pytest.approx(held, rel=1e-3)
        in_layers, in_head = matrices(SIZES[size], parallel, stage)
        passes = 8 if config.memory.recompute == "full" else 6
        assert cost.flops == (passes * in_layers + 6 * in_head) * sum(lengths) // parallel.cp


@pytest.mark.parametrize("size", ["tiny", "qwen3", "llama"])
@pytest.mark.parametrize("tp", [2, 4])
def test_families(size: str, tp: int) -> None:
    """With 4 ranks, two share each head of keys. It is in the memory of one; what it makes, they gather."""
    config = tiny_config({"tp": tp, "pp": 2})
    for stage in (0, 1):
        cost = fake(size, config, 2 * tp, tp * stage, SLOTS)
        assert cost.parameters == parameters(SIZES[size], config.parallel, stage)
        assert cost.flops == 6 * sum(matrices(SIZES[size], config.parallel, stage)) * sum(SLOTS)


def gpu_config(**parallel: Any) -> Config:
    return config_file.parse(
        {
            "model": {"path": "unused"},
            "data": {"train": "unused"},
            "parallel": {"sequence_parallel": True, **parallel},
            "rollout": {"prompts": 512, "responses": 16},
            "train": {"micro_batch_tokens": 32_768},
        }
    )


@pytest.mark.parametrize(
    ("moments", "width"),
    [({}, 2 + 4 + 4), ({"exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": "bfloat16", "betas": [0.9, 0.95]}, 2 + 2 + 2)],
    ids=["float32 moments", "bfloat16 moments"],
)
def test_state_of_the_precision_aware_optimizer(moments: dict[str, Any], width: int) -> None:
    plain = gpu_config(tp=4, pp=4)
    optimizer = OptimizerConfig.model_validate({"precision_aware": True, **moments})
    precise = plain.model_copy(update={"optimizer": optimizer})
    want, got = (fake("7B", config, 32, 0, (4_096,)) for config in (plain, precise))
    assert got.optimizer_bytes == want.optimizer_bytes // 12 * width


def test_7b() -> None:
    check_formulas("7B", gpu_config(tp=4, pp=4), 32, (4_096,) * 2)


@pytest.mark.long
def test_32b() -> None:
    check_formulas("32B", gpu_config(tp=8, pp=2), 128, (4_096,) * 2)


@pytest.mark.long
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_32b_at_tp8_with_32k_tokens(recompute: str) -> None:
    config = gpu_config(tp=8)
    config = config.model_copy(update={"memory": MemoryConfig.model_validate({"recompute": recompute})})
    check_formulas("32B", config, 128, (4_096,) * 8)
    cost = fake("32B", config, 128, 0, (4_096,) * 8)
    hidden, width, layers, slots = 5_120, 27_648, 64, 32_768
    if recompute == "full":
        # Inputs of all layers, a part of the slots each, and the logits.
        kept = layers * slots // 8 * hidden * 2 + slots * 152_064 // 8 * 2
        assert kept < cost.activation_bytes < 1.6 * kept
    else:
        # Both halves of SwiGLU's input, silu, the other half plus 0, and the product: five tensors of [t, F / 8].
        mlp = layers * slots * 5 * width // 8 * 2
        assert mlp < cost.activation_bytes < 2 * mlp


def test_recompute_costs_another_forward_pass_and_saves_memory() -> None:
    none, full = (fake("tiny", tiny_config({}, recompute=choice), 1, 0, SLOTS) for choice in ("none", "full"))
    in_layers, in_head = matrices(SIZES["tiny"], ParallelConfig(), 0)
    assert none.flops == 6 * (in_layers + in_head) * sum(SLOTS)
    assert full.flops == none.flops + 2 * in_layers * sum(SLOTS)
    assert full.activation_bytes < none.activation_bytes


HIDDEN, LAYERS = 32, 2
WHOLE = sum(SLOTS) * HIDDEN * 2
"""Bytes of the activations of all slots between two layers."""
TP, CP, PP, DP = (f"{name}_PARALLEL_GROUP" for name in ("TENSOR_MODEL", "CONTEXT", "PIPELINE_MODEL", "DATA"))
DP_CP = f"{DP}_WITH_CP"


def counted(cost: RankCost) -> dict[tuple[str, str, int], int]:
    """(kind, group, bytes) -> calls, of groups of more than one rank."""
    return dict(Counter((one.kind, one.group, one.bytes) for one in cost.collectives if len(one.ranks) > 1))


@pytest.mark.parametrize("rank", [0, 1])
def test_collectives_of_sequence_parallel(rank: int) -> None:
    cost = fake("tiny", tiny_config({"tp": 2, "sequence_parallel": True}), 2, rank, SLOTS)
    assert {one.ranks for one in cost.collectives if one.group == TP} == {(0, 1)}
    assert counted(cost) == {
        # Forward, before both halves of each layer and before the output layer. Backward, each of them again for the
        # gradient of the weight, but not for the output layer; once more in each half for the gradient of what was
        # scattered, and for that of the embedding.
        ("_allgather_base", TP, WHOLE): (2 * LAYERS + 1) + 2 * LAYERS + (2 * LAYERS + 1),
        # Forward, after the embedding and both halves of each layer; backward, before both halves.
        ("_reduce_scatter_base", TP, WHOLE): (2 * LAYERS + 1) + 2 * LAYERS,
        # The gradient of the output layer's input.
        ("allreduce", TP, WHOLE): 1,
        # Log-probs: the maximum, float32; three sums, float64.
        ("allreduce", TP, sum(SLOTS) * 4): 1,
        ("allreduce", TP, sum(SLOTS) * 3 * 8): 1,
        # Gradients of the norms, each from this rank's slots, float32.
        ("allreduce", TP, (2 * LAYERS + 1) * HIDDEN * 4): 1,
    }


@pytest.mark.parametrize("rank", [0, 1])
def test_collectives_of_context_parallel(rank: int) -> None:
    cost = fake("tiny", tiny_config({"cp": 2}), 2, rank, SLOTS)
    keys_and_values = sum(SLOTS) * 2 * (HIDDEN // 4 * 2) * 2
    calls = counted(cost)
    assert calls.pop(("_allgather_base", CP, keys_and_values)) == LAYERS
    assert calls.pop(("_reduce_scatter_base", CP, keys_and_values)) == LAYERS
    # Both ranks have parts of the same sequences: gradients and counts are summed as over replicas.
    assert calls == over_replicas(cost)


def over_replicas(cost: RankCost) -> dict[tuple[str, str, int], int]:
    return {
        ("reduce_scatter_tensor_coalesced", DP_CP, cost.gradient_bytes): 1,
        # The count of tokens, int32.
        ("allreduce", DP_CP, 4): 1,
        # Measures: six means with their counts and a maximum, float64.
        ("allreduce", DP_CP, 6 * 2 * 8): 1,
        ("allreduce", DP_CP, 8): 1,
    }


def test_collectives_of_data_parallel() -> None:
    cost = fake("tiny", tiny_config({}), 2, 1, SLOTS)
    assert counted(cost) == over_replicas(cost)
    # A replica steps its part, and gets the others' of all parameters.
    gathered = [("allgather_into_tensor_coalesced", DP_CP, (0, 1), cost.parameter_bytes)]
    assert [(one.kind, one.group, one.ranks, one.bytes) for one in cost.step_collectives] == gathered
    overlapped = fake("tiny", tiny_config({"overlap_grad_reduce": True, "overlap_param_gather": True}), 2, 1, SLOTS)
    assert overlapped.step_collectives == ()
    plain = fake("tiny", tiny_config({"distributed_optimizer": False}), 2, 1, SLOTS)
    assert plain.step_collectives == ()
    gradients = [one for one in plain.collectives if one.bytes == plain.gradient_bytes]
    assert [(one.kind, one.ranks) for one in gradients] == [("allreduce_coalesced", (0, 1))]


def test_collectives_of_a_pipeline() -> None:
    config = tiny_config({"pp": 2})
    first, last = (fake("tiny", config, 2, rank, SLOTS) for rank in range(2))

    def sent(cost: RankCost) -> list[tuple[str, int]]:
        return [(one.kind, one.bytes) for one in cost.collectives if one.kind in ("send", "recv")]

    # The shape goes before the tensor: three int64.
    assert sent(first) == [("send", 24), ("send", WHOLE), ("recv", 24), ("recv", WHOLE)]
    assert sent(last) == [("recv", 24), ("recv", WHOLE), ("send", 24), ("send", WHOLE)]
    for cost in (first, last):
        rest = [one for one in cost.collectives if len(one.ranks) > 1 and one.kind not in ("send", "recv")]
        assert {(one.kind, one.group, one.ranks) for one in rest} == {("broadcast", PP, (0, 1))}
        # The count of tokens, int32, and the measures, pickled: their length, then they.
        assert [one.bytes for one in rest][:2] == [4, 8]
        assert len(rest) == 3


def test_a_mesh_of_all_kinds() -> None:
    config = tiny_config({"tp": 2, "cp": 2, "pp": 2, "sequence_parallel": True})
    cost = fake("tiny", config, 16, 13, SLOTS)
    # Ranks count tp first, then cp, dp and pp.
    assert {one.group: one.ranks for one in cost.collectives} == {
        TP: (12, 13),
        CP: (13, 15),
        DP_CP: (9, 11, 13, 15),
        PP: (5, 13),
    }

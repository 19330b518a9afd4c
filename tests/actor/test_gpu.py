"""One rank in bfloat16 on a GPU, with Transformer Engine's layers and with torch's.

Each test runs on CPU as well, without what only CUDA can show, so that on a GPU it is the code that is tested.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.batches import make_micro_batch, make_mini_batch, ratio_loss, reference_logprobs
from tests.helpers.models import load_reference, make_config, save_qwen2, save_tiny

HERE = [
    pytest.param(None, id="cpu"),
    pytest.param("torch", id="torch", marks=pytest.mark.gpu),
    pytest.param("transformer_engine", id="transformer_engine", marks=pytest.mark.gpu),
]
ON_GPU = HERE[1:]
BATCHES = [make_micro_batch([5, 130, 1, 90, 40], seed=1), make_micro_batch([200, 64], seed=2)]
HIDDEN = 256
"""With four heads, of 64 channels: every attention kernel takes them."""
FAMILIES: dict[str, dict[str, Any]] = {"qwen2": {}, "qwen3": {"head_dim": 128}, "llama3": {}}


@pytest.fixture(autouse=True)
def present(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise Transformer Engine's attention may add up gradients in any order.
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    if "layers" not in request.fixturenames:
        return
    layers = request.getfixturevalue("layers")
    if layers == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")
    if layers is None and torch.cuda.is_available():
        pytest.skip("torch sees a GPU here; on CPU this runs with `make test`")


def build(path: Path, topo: Any, layers: str | None, **sections: Any) -> tuple[Any, Any]:
    from dapo_megatron.actor.actor import Actor
    from dapo_megatron.weights.hf import HfCheckpoint

    checkpoint = HfCheckpoint(path)
    config = make_config(path, model={"dtype": "bfloat16", "layers": layers}, **sections)
    return Actor(config, topo, checkpoint), checkpoint


def exported(actor: Any, checkpoint: Any) -> dict[str, Tensor]:
    return {name: tensor.to("cpu", copy=True) for name, tensor in checkpoint.export(actor.chunks)}


def filled(actor: Any) -> Any:
    (mini_batch,), _ = actor.with_old_logprobs([make_mini_batch(BATCHES)])
    return mini_batch


def logprobs_of(mini_batch: Any) -> Tensor:
    """Log-probs of the scored slots of all micro-batches, float64 on CPU."""
    parts = [batch.old_logprobs_T.cpu().double()[batch.scored_T.cpu()] for batch in mini_batch.micro_batches]
    return torch.cat(parts)


def reference(path: Path, dtype: torch.dtype) -> Tensor:
    model = load_reference(path, dtype)
    with torch.no_grad():
        return torch.cat([reference_logprobs(model, batch).double()[batch.scored_T] for batch in BATCHES])


@pytest.mark.parametrize("layers", HERE)
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_as_exact_as_hugging_faces_in_bfloat16(
    layers: str | None, family: str, alone: Any, tmp_path: Path
) -> None:
    save_tiny(tmp_path, family, hidden=HIDDEN, dtype=torch.bfloat16, **FAMILIES[family])
    actor, _ = build(tmp_path, alone, layers)
    exact, rounded = (reference(tmp_path, dtype) for dtype in (torch.float64, torch.bfloat16))
    error, unit = (math.sqrt(float((got - exact).square().mean())) for got in (logprobs_of(filled(actor)), rounded))
    assert 0 < error < 2 * unit


@pytest.mark.parametrize("layers", HERE)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_come_back_bit_for_bit(layers: str | None, tied: bool, family: str, alone: Any, tmp_path: Path) -> None:
    save_tiny(tmp_path / "given", family, tied=tied, hidden=HIDDEN, dtype=torch.bfloat16, **FAMILIES[family])
    actor, checkpoint = build(tmp_path / "given", alone, layers)
    wanted = {
        name: param.detach() for name, param in load_reference(tmp_path / "given", torch.bfloat16).named_parameters()
    }
    found = exported(actor, checkpoint)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    checkpoint.save(actor.chunks, tmp_path / "saved")
    saved = dict(load_reference(tmp_path / "saved", torch.bfloat16).named_parameters())
    assert all(torch.equal(saved[name], wanted[name]) for name in wanted)


RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "mlp": {"recompute": "selective"},
    "core_attn": {"recompute": "selective", "recompute_modules": ["core_attn"]},
    "one layer": {"recompute": "full", "recompute_layers": 1},
    "full": {"recompute": "full"},
}


@pytest.mark.parametrize("layers", HERE)
def test_the_first_ratio_is_one_and_recomputing_changes_nothing(layers: str | None, alone: Any, tmp_path: Path) -> None:
    save_qwen2(tmp_path, hidden=HIDDEN, layers=4, dtype=torch.bfloat16)
    weights, peaks = {}, {}
    for name, memory in RECOMPUTE.items():
        actor, checkpoint = build(tmp_path, alone, layers, memory=memory)
        mini_batch = filled(actor)
        actor.gradient(mini_batch, ratio_loss)  # libraries take their workspaces
        before = 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        result = actor.update(mini_batch, ratio_loss, lr=1e-2)
        assert (result["ratio/mean"], result["ratio/max"], result.skipped) == (1.0, 1.0, None)
        if torch.cuda.is_available():
            peaks[name] = torch.cuda.max_memory_allocated() - before
        weights[name] = exported(actor, checkpoint)
        del actor
    none = weights.pop("none")
    for name, found in weights.items():
        assert all(torch.equal(found[key], none[key]) for key in none), name
    if torch.cuda.is_available():
        assert peaks["full"] < peaks["one layer"] < peaks["none"] and peaks["mlp"] < peaks["none"]


@pytest.mark.parametrize("layers", HERE)
def test_what_is_offloaded_comes_back_bit_for_bit(layers: str | None, alone: Any, tmp_path: Path) -> None:
    save_qwen2(tmp_path, hidden=HIDDEN, dtype=torch.bfloat16)
    weights = []
    for offload in ([], ["optimizer", "gradients", "parameters"]):
        actor, checkpoint = build(tmp_path, alone, layers, memory={"offload": offload})
        for _ in range(3):
            held = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
            gradients = sum(buffer.grad_data.nbytes for module in actor._modules for buffer in module.buffers)
            with actor.away():
                if torch.cuda.is_available() and offload:
                    assert held - torch.cuda.memory_allocated() > gradients
            actor.update(filled(actor), ratio_loss, lr=1e-3)
        weights.append(exported(actor, checkpoint))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("layers", HERE)
def test_norms_count_each_parameter_once(layers: str | None, alone: Any, tmp_path: Path) -> None:
    save_qwen2(tmp_path, hidden=HIDDEN, tied=False, dtype=torch.bfloat16)
    actor, checkpoint = build(tmp_path, alone, layers, optimizer={"clip_grad": 0.0})
    result = actor.update(filled(actor), ratio_loss, lr=1e-4)
    with actor.gradients_as_weights():
        squares = [float(tensor.double().square().sum()) for tensor in exported(actor, checkpoint).values()]
    # Gradients are exported in the dtype of the weights.
    assert result["grad_norm"] == pytest.approx(math.sqrt(sum(squares)), rel=2e-3)
    kinds = {name: value for name, value in _values(result).items() if name.startswith("grad_norm/")}
    assert set(kinds) == {f"grad_norm/{kind}" for kind in ("norm", "embedding", "attention", "mlp", "output")}
    assert result["grad_norm"] == pytest.approx(math.hypot(*kinds.values()), rel=1e-5)
    weights = [float(tensor.double().square().sum()) for tensor in exported(actor, checkpoint).values()]
    found = [value for name, value in _values(result).items() if name.startswith("weight_norm/")]
    assert math.hypot(*found) == pytest.approx(math.sqrt(sum(weights)), rel=1e-3)


def _values(result: Any) -> dict[str, float]:
    return {name: measure.value for name, measure in result.measures.items()}


@pytest.mark.parametrize("layers", ["transformer_engine"])
@pytest.mark.gpu
def test_a_gradient_is_added_up_in_float32_from_the_product_on(layers: str, alone: Any, tmp_path: Path) -> None:
    save_qwen2(tmp_path, hidden=HIDDEN, dtype=torch.bfloat16)
    actor, _ = build(tmp_path, alone, layers)
    (mini_batch,), _ = actor.with_old_logprobs([make_mini_batch(BATCHES[:1])])
    actor.gradient(mini_batch, ratio_loss)
    linear = actor.chunks[0].decoder.layers[0].mlp.linear_fc2.weight.main_grad
    assert linear.dtype is torch.float32
    # Before it was divided by the number of tokens, the gradient of a single micro-batch would be numbers of bfloat16.
    rounded = (linear * mini_batch.loss_tokens).bfloat16().float() / mini_batch.loss_tokens
    assert (rounded - linear).abs().max() > 1e-5 * linear.abs().max()


@pytest.mark.parametrize("layers", ON_GPU)
def test_the_host_does_not_wait_for_the_gpu_layer_by_layer(layers: str, alone: Any, tmp_path: Path) -> None:
    waits = []
    for depth in (2, 4):
        save_qwen2(tmp_path / str(depth), hidden=HIDDEN, layers=depth, dtype=torch.bfloat16)
        actor, _ = build(tmp_path / str(depth), alone, layers)
        mini_batch = filled(actor)
        actor.gradient(mini_batch, ratio_loss)  # what is made once is made here
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                actor.gradient(mini_batch, ratio_loss)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchroniz" in str(warning.message) for warning in caught))
    assert waits[0] == waits[1]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_of_a_whole_vocabulary_are_exact(dtype: torch.dtype, alone: Any) -> None:
    from dapo_megatron.actor.logprobs import vocab_parallel_logprobs

    generator = torch.Generator().manual_seed(0)
    logits_TV = (4 * torch.randn(300, 152_064, generator=generator)).to(dtype)
    labels_T = torch.randint(152_000, (300,), generator=generator)
    exact_TV = logits_TV.double().requires_grad_()
    logs_TV = torch.log_softmax(exact_TV[:, :152_000] / 0.9, -1)
    logprobs_T = logs_TV.gather(1, labels_T[:, None]).squeeze(1)
    (wanted_TV,) = torch.autograd.grad(logprobs_T.sum(), exact_TV)
    group: Any = torch.distributed.group.WORLD
    given_TV = logits_TV.cuda().requires_grad_()
    scores = vocab_parallel_logprobs(
        given_TV, labels_T.cuda(), temperature=0.9, vocab_size=152_000, tp_group=group, with_stats=True
    )
    (found_TV,) = torch.autograd.grad(scores.logprobs_T.sum(), given_TV)
    assert scores.entropy_T is not None and scores.top_prob_T is not None
    logs_TV = logs_TV.detach()
    for found_T, wanted_T in (
        (scores.logprobs_T, logprobs_T.detach()),
        (scores.entropy_T, -(logs_TV.exp() * logs_TV).sum(-1)),
        (scores.top_prob_T, logs_TV.exp().amax(-1)),
    ):
        torch.testing.assert_close(found_T.detach().cpu().double(), wanted_T, rtol=1e-5, atol=1e-5)
    limit = 1e-5 if dtype is torch.float32 else 2.0**-8
    assert float((found_TV.cpu().double() - wanted_TV).abs().max() / wanted_TV.abs().max()) < limit

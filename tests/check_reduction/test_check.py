"""The whole check: every layout agrees, and every way to get the reduction wrong is seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dapo_megatron.check_reduction.check import check_reduction
from dapo_megatron.check_reduction.pool import RankPool
from dapo_megatron.config import AlgoConfig, Config
from dapo_megatron.errors import ConfigError
from tests.helpers.checkpoint import write_checkpoint
from tests.helpers.distributed import POOL, run_distributed
from tests.helpers.models import make_config

pytestmark = [pytest.mark.multiproc, pytest.mark.slow]


Mutation = Callable[[pytest.MonkeyPatch], None]


class _Broken(RankPool):
    """The ranks that all tests share, broken for one check."""

    def __init__(self, mutation: Mutation) -> None:
        self._mutation = mutation

    def run(self, ranks: int, function: Callable[..., Any], *arguments: Any, timeout: float) -> list[Any]:
        return run_distributed(_break_and_call, ranks, self._mutation, function, *arguments, timeout=timeout)


def _break_and_call(mutation: Mutation, function: Callable[..., Any], *arguments: Any) -> Any:
    import dapo_megatron.check_reduction.rank  # noqa: F401  all that there is to break

    with pytest.MonkeyPatch.context() as patch:
        mutation(patch)
        return function(*arguments)


def config_of(folder: Path, **sections: Any) -> Config:
    return make_config(write_checkpoint(folder / "model"), **sections)


def test_layouts_of_every_kind_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_reduction(config_of(tmp_path), ["tp2xcp2+sp", "dp2xpp2+vpp2+dist-opt+overlap"], pool=POOL)
    assert "PASS: all 32 checks" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_standard_layout_agrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_reduction(config_of(tmp_path), pool=POOL)
    output = capsys.readouterr().out
    assert "PASS: all 272 checks" in output
    assert output.count("tp2+sp ") == output.count("pp2+vpp2 ") == output.count("dp2xcp2 ") == 2


def test_bfloat16_agrees_in_the_norm_of_every_parameter(tmp_path: Path) -> None:
    assert check_reduction(config_of(tmp_path), ["dp2+dist-opt"], dtype="bfloat16", pool=POOL)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("layers", "dtype"), [("torch", "float32"), ("torch", "bfloat16"), ("transformer_engine", "bfloat16")]
)
def test_it_agrees_on_a_gpu(layers: str, dtype: Any, tmp_path: Path) -> None:
    if layers == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")
    assert check_reduction(config_of(tmp_path, model={"layers": layers}), ["1"], processes=1, dtype=dtype)


SETTINGS = {
    "grpo": {"loss_scope": "sample", "dapo": {"clip_high": 0.2}, "kl": {"coef": 0.1, "estimator": "k2"}},
    "to the letter": {"loss_scope": "prompt", "dapo": {"dual_clip": 3.0}, "advantage_std": "none"},
    "truncated tokens": {"correction": {"kind": "truncated"}, "dapo": {"dual_clip": 10.0}},
    "masked tokens": {"correction": {"kind": "masked"}, "loss_scope": "sample"},
    "masked responses": {"correction": {"kind": "masked", "level": "sequence", "band": [0.9, 1.1]}},
    "dr grpo": {"loss_scope": "constant", "scope_length": 40, "advantage_std": "none"},
    "gspo": {"loss": "gspo", "loss_scope": "sample"},
    "gspo, masked tokens": {"loss": "gspo", "correction": {"kind": "masked"}, "kl": {"coef": 0.1}},
    "cispo": {"loss": "cispo", "cispo": {"clip_low": 0.3}},
}


EVERY_DAY = ("grpo", "masked responses", "gspo, masked tokens")


@pytest.mark.parametrize(
    "algo",
    [
        pytest.param(algo, id=name, marks=[] if name in EVERY_DAY else pytest.mark.long)
        for name, algo in SETTINGS.items()
    ],
)
def test_so_does_every_setting_of_the_algorithm(algo: dict[str, Any], tmp_path: Path) -> None:
    larger_passes = {"mini_batch": 8, "logprob_tokens": 40_000}  # not part of the check, and no reason to fail
    config = config_of(tmp_path, algo=algo, rollout={"temperature": 0.7}, train=larger_passes)
    assert check_reduction(config, ["dp2xcp2"], pool=POOL)


def change_loss(patch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    """Let every rank's loss be what `change` makes of its TokenLoss."""
    from dapo_megatron.algo.objective import Objective

    original = Objective.__call__
    patch.setattr(Objective, "__call__", lambda self, *args: change(original(self, *args)))


def multiply_by_cp_size(patch: pytest.MonkeyPatch) -> None:
    from megatron.core import parallel_state as mpu

    change_loss(patch, lambda loss: replace(loss, loss_sum=loss.loss_sum * mpu.get_context_parallel_world_size()))


def clamp_a_zero_count_to_one(patch: pytest.MonkeyPatch) -> None:
    change_loss(patch, lambda loss: replace(loss, loss_tokens=loss.loss_tokens.clamp(min=1)))


def drop_the_count_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    from megatron.core import parallel_state as mpu

    change_loss(
        patch,
        lambda loss: replace(loss, loss_tokens=loss.loss_tokens * (mpu.get_data_parallel_rank() == 0)),
    )


def average_micro_batches(patch: pytest.MonkeyPatch) -> None:
    """The mean over micro-batches of their means. The counts stay right: only the gradient can tell."""
    from megatron.core import parallel_state as mpu

    from dapo_megatron.actor.actor import Actor

    original = Actor.gradient

    def gradient(self: Any, mini_batch: Any, loss: Any) -> Any:
        micro_batches = len(mini_batch.micro_batches) * mpu.get_data_parallel_world_size()

        def averaged(*given: Any) -> Any:
            result = loss(*given)
            share = mini_batch.loss_tokens / micro_batches / result.loss_tokens.clamp(min=1)
            return replace(result, loss_sum=result.loss_sum * share)

        return original(self, mini_batch, averaged)

    patch.setattr(Actor, "gradient", gradient)


def forget_norms_under_sequence_parallel(patch: pytest.MonkeyPatch) -> None:
    import sys

    module: Any = sys.modules["megatron.core.distributed.finalize_model_grads"]
    patch.setattr(module, "_allreduce_non_tensor_model_parallel_grads", lambda *args: None)


def forget_the_tied_embedding_of_the_last_stage(patch: pytest.MonkeyPatch) -> None:
    import sys

    module: Any = sys.modules["megatron.core.distributed.finalize_model_grads"]
    patch.setattr(module, "_allreduce_word_embedding_grads", lambda *args: None)


def change_correction(patch: pytest.MonkeyPatch, change: Callable[[Any], dict[str, Any]]) -> None:
    """Let the weighing see another correction: the configured one, with what `change` makes of it."""
    from dapo_megatron.algo import weighing

    original: Any = weighing.correct
    patch.setattr(weighing, "correct", lambda *args: original(*args[:-1], args[-1].model_copy(update=change(args[-1]))))


def ignore_the_cap(patch: pytest.MonkeyPatch) -> None:
    change_correction(patch, lambda correction: {"cap": math.inf})


def widen_the_band(patch: pytest.MonkeyPatch) -> None:
    change_correction(patch, lambda correction: {"band": (0.9 * correction.band[0], 1.1 * correction.band[1])})


def forget_the_dual_clip(patch: pytest.MonkeyPatch) -> None:
    from dapo_megatron.algo.losses import dapo

    original = dapo.clip
    patch.setattr(dapo, "clip", lambda *args, **how: original(*args, **{**how, "dual": None}))


def forget_the_other_parts_of_a_response(patch: pytest.MonkeyPatch) -> None:
    from dapo_megatron.actor.actor import Actor

    patch.setattr(Actor, "_context_sum", lambda self, part: part)


def forget_the_gradient_of_the_other_parts(patch: pytest.MonkeyPatch) -> None:
    from dapo_megatron.actor.actor import Actor

    original = Actor._context_sum
    patch.setattr(Actor, "_context_sum", lambda self, part: original(self, part.detach()) + part - part.detach())


def exchange_the_logprobs_of_updates(patch: pytest.MonkeyPatch) -> None:
    from dapo_megatron.actor import actor

    original = actor._filled

    def filled(mini_batches: Any, name: str, logprobs: Any) -> Any:
        return [
            replace(own, micro_batches=other.micro_batches)
            for own, other in zip(mini_batches, reversed(original(mini_batches, name, logprobs)), strict=True)
        ]

    patch.setattr(actor, "_filled", filled)


def share_one_count_among_updates(patch: pytest.MonkeyPatch) -> None:
    from dapo_megatron.algo import weighing

    class Summed:
        def __init__(self, replicas: Any) -> None:
            self._replicas = replicas
            self.max = replicas.max

        def sum(self, values: Any) -> Any:
            total = self._replicas.sum(values)
            return total.sum(0, keepdim=True).expand_as(total)

    original = weighing.scoped
    patch.setattr(weighing, "scoped", lambda whole, of, replicas: original(whole, of, Summed(replicas)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mutation", "algo"),
    [
        (share_one_count_among_updates, {"loss_scope": "sample"}),
        (share_one_count_among_updates, {"loss_scope": "prompt"}),
        (exchange_the_logprobs_of_updates, {}),
        (ignore_the_cap, {"correction": {"kind": "truncated"}}),
        (widen_the_band, {"correction": {"kind": "masked"}}),
        (widen_the_band, {"correction": {"kind": "masked", "level": "sequence"}}),
        (forget_the_dual_clip, {"dapo": {"dual_clip": 10.0}}),
    ],
)
def test_a_wrong_weight_or_clip_fails(mutation: Mutation, algo: dict[str, Any], tmp_path: Path) -> None:
    assert not check_reduction(config_of(tmp_path, algo=algo), ["1"], pool=_Broken(mutation))


@pytest.mark.parametrize("mutation", [forget_the_other_parts_of_a_response, forget_the_gradient_of_the_other_parts])
def test_a_wrong_ratio_of_a_response_fails(mutation: Mutation, tmp_path: Path) -> None:
    assert not check_reduction(config_of(tmp_path, algo={"loss": "gspo"}), ["cp2"], pool=_Broken(mutation))


WITHOUT_REFERENCE = replace(AlgoConfig().found_loss, reference=None)


def test_a_loss_without_a_reference_is_refused_by_name(tmp_path: Path) -> None:
    config = config_of(tmp_path, algo={"loss": f"{__name__}:WITHOUT_REFERENCE"})
    with pytest.raises(ConfigError, match=r"algo\.loss=.*:WITHOUT_REFERENCE brings no reference"):
        check_reduction(config, ["1"], pool=POOL)


def divide_by_the_replicas(patch: pytest.MonkeyPatch) -> None:
    from megatron.core import parallel_state as mpu

    change_loss(patch, lambda loss: replace(loss, loss_sum=loss.loss_sum / mpu.get_data_parallel_world_size()))


@pytest.mark.parametrize(
    ("mutation", "layout", "seen"),
    [
        (multiply_by_cp_size, "cp2", ""),
        (clamp_a_zero_count_to_one, "dp2", "the gradient was divided by"),
        (average_micro_batches, "1", ""),
        (average_micro_batches, "dp2", ""),
        (drop_the_count_of_one_rank, "dp2", "the gradient was divided by"),
        (divide_by_the_replicas, "dp2+dist-opt", ""),
        (forget_norms_under_sequence_parallel, "tp2+sp", "norm"),
        (forget_the_tied_embedding_of_the_last_stage, "pp2", "embed_tokens"),
    ],
)
def test_a_wrong_reduction_fails(
    mutation: Mutation, layout: str, seen: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not check_reduction(config_of(tmp_path), [layout], pool=_Broken(mutation))
    output = capsys.readouterr().out
    assert "FAIL: " in output and seen in output


@pytest.mark.parametrize("mutation", [divide_by_the_replicas, average_micro_batches])
def test_it_fails_in_bfloat16_too(mutation: Mutation, tmp_path: Path) -> None:
    assert not check_reduction(config_of(tmp_path), ["dp2"], dtype="bfloat16", pool=_Broken(mutation))


def _die_at_once(patch: pytest.MonkeyPatch) -> None:
    import os

    os._exit(3)


def test_a_rank_that_dies_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not check_reduction(config_of(tmp_path), ["1"], pool=_Broken(_die_at_once))
    assert "rank 0 failed: it died" in capsys.readouterr().out

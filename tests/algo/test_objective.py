from dataclasses import replace

import pytest
import torch

from dapo_megatron.algo.loss import Loss
from dapo_megatron.algo.objective import Objective
from dapo_megatron.config import AlgoConfig
from dapo_megatron.config.algo import loss_sections
from dapo_megatron.config.section import Section
from dapo_megatron.errors import LossError
from dapo_megatron.measures import Mean
from tests.helpers.losses import batch_of, lose

LOGPROBS = torch.tensor([-1.0, -0.5, -2.0])
BATCH = batch_of(
    torch.tensor([-1.0, -1.5, -5.0]),
    torch.tensor([1.0, 1.0, -1.0]),
    torch.tensor([False, True, True]),
    weights_T=torch.tensor([1.0, 0.5, 1.5]),
    ref_T=torch.tensor([-1.0, -0.25, -2.5]),
)


class Settings(Section):
    scale: float = 2.0


SCALED = Loss(
    settings=Settings,
    per_token=lambda given, settings: (
        -settings.scale * given.log_ratio_T * given.advantages_T,
        {"of_my_own": Mean(given.mask_T.sum())},
    ),
    meanings={"of_my_own": "tokens"},
)
FORGETFUL = replace(SCALED, meanings={**SCALED.meanings, "other": "measured on some ranks only"})
USURPER = replace(
    SCALED,
    per_token=lambda given, settings: (given.logprobs_T, {"ratio/max": Mean(0)}),
    meanings={"ratio/max": "what the actor looks at"},
)


def test_dapo_as_configured():
    dapo = {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 3.0}
    result = lose(LOGPROBS, BATCH, dapo=dapo, kl={"coef": 0.5, "estimator": "k2"})
    # -1.3 at half weight, +3 at one and a half; KL 0.5 * ((-0.25)^2 / 2 * 0.5 + 0.5^2 / 2 * 1.5)
    assert result.loss_sum.item() == pytest.approx(-0.65 + 4.5 + 0.5 * (0.015625 + 0.1875))


def test_a_loss_of_ones_own_by_the_name_of_its_module():
    name = f"{__name__}:SCALED"
    result = lose(LOGPROBS, BATCH, loss=name)
    # 2 x (1 x 0.5 weight - 3 x 1.5 weight)
    assert result.loss_sum.item() == pytest.approx(-2 * (0.5 - 4.5))
    assert result.measures["of_my_own"].value == 2
    assert lose(LOGPROBS, BATCH, loss=name, SCALED={"scale": 1.0}).loss_sum.item() == pytest.approx(4.0)


ADDED_UP = replace(SCALED, per_token=lambda given, settings: (given.logprobs_T.mean(), {"of_my_own": Mean(1)}))
BARE = replace(SCALED, per_token=lambda given, settings: given.logprobs_T)
PLAIN = replace(SCALED, per_token=lambda given, settings: (given.logprobs_T, {"of_my_own": 0.5}))
UNNAMED = replace(SCALED, per_token=lambda given, settings: (given.logprobs_T, {"ratio/max": Mean(1)}))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("ADDED_UP", r"got a tensor of shape \(\)\. Neither add up nor average"),
        ("UNNAMED", r"must measure .*'of_my_own'.* got {'ratio/max'"),
        ("BARE", r"a value for each of the 3 slots, and its measures; got Tensor"),
        ("PLAIN", r"each as a Sum, Mean or Max.* got {'of_my_own': 0\.5}"),
    ],
)
def test_a_loss_that_adds_up_or_measures_something_else_is_refused(name, problem):
    with pytest.raises(LossError, match=problem):
        lose(LOGPROBS, BATCH, loss=f"{__name__}:{name}")


def test_old_logprobs_are_demanded():
    with pytest.raises(AssertionError, match="old log-probs"):
        lose(LOGPROBS, replace(BATCH, old_logprobs_T=None))


@pytest.mark.parametrize("name", loss_sections())
def test_what_a_loss_measures_has_a_meaning(name):
    loss = AlgoConfig(loss=name).found_loss
    measured = Objective(AlgoConfig(loss=name))(LOGPROBS, BATCH).measures
    assert set(measured) - {"ratio/mean", "ratio/max", "kl/old", "kl/ref"} == set(loss.meanings)


@pytest.mark.parametrize("name", loss_sections())
def test_gradient_against_the_reference_of_the_loss(name):
    """Written twice, the second time as the paper prints it."""
    algo = AlgoConfig(loss=name)
    generator = torch.Generator().manual_seed(3)
    for advantage in (1.5, -0.5):
        old = torch.randn(40, generator=generator, dtype=torch.float64) - 2
        logprobs = (old + 0.3 * torch.randn(40, generator=generator, dtype=torch.float64)).requires_grad_()
        batch = batch_of(old, torch.full_like(old, advantage), torch.ones(40, dtype=torch.bool))
        loss = Objective(algo)(logprobs, batch).loss_sum
        assert algo.found_loss.reference is not None
        wanted = -algo.found_loss.reference(logprobs, old, advantage, algo.settings).sum()
        assert loss.item() == pytest.approx(wanted.item(), abs=1e-9)
        got, want = (torch.autograd.grad(x, logprobs)[0] for x in (loss, wanted))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["FORGETFUL", "USURPER"])
def test_measures_that_ranks_could_not_reduce_together_are_refused(name):
    with pytest.raises(LossError, match=f"{name} must measure"):
        lose(LOGPROBS, BATCH, loss=f"{__name__}:{name}")

import pytest
import torch

from dapo_megatron.algo.kl import k2, k3

POLICY = torch.tensor([0.2, 0.3, -0.4], dtype=torch.float64)
REFERENCE = torch.tensor([-0.1, 0.5, 0.3], dtype=torch.float64)


def exact_kl(logits, reference):
    p, q = logits.log_softmax(0), reference.log_softmax(0)
    return (p.exp() * (p - q)).sum()


def mean_over_policy(estimator, logits):
    """Expectation over samples of the policy; the gradient is that of a loss on given samples."""
    logprobs = logits.log_softmax(0)
    return (logprobs.detach().exp() * estimator(logprobs, REFERENCE.log_softmax(0))).sum()


def test_k3_is_unbiased():
    torch.testing.assert_close(mean_over_policy(k3, POLICY), exact_kl(POLICY, REFERENCE), rtol=1e-12, atol=0)


def test_gradients_on_samples_of_the_policy():
    def gradient(value):
        logits = POLICY.clone().requires_grad_()
        return torch.autograd.grad(value(logits), logits)[0]

    def reverse_kl(logits):
        return exact_kl(REFERENCE, logits)

    kl = gradient(lambda logits: exact_kl(logits, REFERENCE))
    torch.testing.assert_close(gradient(lambda logits: mean_over_policy(k2, logits)), kl, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(gradient(lambda logits: mean_over_policy(k3, logits)), gradient(reverse_kl))


def test_values():
    p, q = torch.tensor([-1.0, -2.0]).double(), torch.tensor([-1.5, -1.0]).double()
    assert k2(p, q).tolist() == [0.125, 0.5]
    torch.testing.assert_close(k3(p, q), torch.tensor([0.10653065971263342, 0.7182818284590451]).double())


def test_k3_keeps_small_differences_in_float32():
    p = torch.tensor([-1.0])
    q = p + 2**-12
    assert k3(p, q).item() == pytest.approx(2**-25, rel=1e-3)

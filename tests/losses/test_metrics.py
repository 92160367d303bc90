import pytest
import torch

from prefcore.losses import preference_metrics


def test_metrics_are_trls_per_pair():
    chosen = torch.tensor([-10.0, -12.0, -8.0], requires_grad=True)
    rejected = torch.tensor([-11.0, -9.0, -8.0], requires_grad=True)
    ref_chosen, ref_rejected = torch.tensor([-11.0, -12.0, -9.0]), torch.tensor([-10.0, -10.0, -9.0])
    metrics = preference_metrics(chosen, rejected, ref_chosen, ref_rejected, beta=0.5)
    assert {name: value.tolist() for name, value in metrics.named().items()} == {
        "rewards/chosen": [0.5, 0.0, 0.5],
        "rewards/rejected": [-0.5, 0.5, 0.5],
        "rewards/margins": [1.0, -0.5, 0.0],
        "rewards/accuracies": [1.0, 0.0, 0.0],  # a tie counts as wrong
        "logps/chosen": [-10.0, -12.0, -8.0],
        "logps/rejected": [-11.0, -9.0, -8.0],
    }
    assert not any(value.requires_grad for value in metrics)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_metrics_are_float32_unless_given_float64(dtype):
    metrics = preference_metrics(*(torch.zeros(2, dtype=dtype),) * 4, beta=0.1)
    assert {value.dtype for value in metrics} == {torch.promote_types(dtype, torch.float32)}


def test_beta_per_pair_and_no_pairs():
    logps = [torch.tensor([2.0, 2.0]), *(torch.zeros(2),) * 3]
    metrics = preference_metrics(*logps, beta=torch.tensor([0.5, 1.0]))
    assert metrics.chosen_rewards.tolist() == [1.0, 2.0]
    assert all(value.shape == (0,) for value in preference_metrics(*(torch.zeros(0),) * 4, beta=0.1))


def test_refusals():
    zeros = torch.zeros(2)
    with pytest.raises(ValueError, match=r"beta must be in \(0.0, inf\), got 0"):
        preference_metrics(zeros, zeros, zeros, zeros, beta=0)
    with pytest.raises(ValueError, match=r"ref_chosen_logps must have shape \[2\]"):
        preference_metrics(zeros, zeros, zeros[:1], zeros, beta=0.1)

"""Token statistics of given logits: time of forward and backward, beside eager PyTorch."""

import pytest
import torch

import prefcore

CUDA = torch.cuda.is_available()
SHAPE = (8192, 151936) if CUDA else (512, 32768)
DTYPE = torch.bfloat16 if CUDA else torch.float32


def eager(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def fused(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return prefcore.logprobs(logits, targets).logps


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("provider", [fused, eager], ids=["prefcore", "PyTorch"])
def test_logprobs(provider, gradient, benchmark):
    device = "cuda" if CUDA else "cpu"
    logits = torch.randn(SHAPE, device=device, dtype=DTYPE, requires_grad=gradient)
    targets = torch.randint(SHAPE[1], SHAPE[:1], device=device)
    wait = torch.cuda.synchronize if CUDA else lambda: None

    def step():
        logits.grad = None
        logps = provider(logits, targets)
        if gradient:
            logps.sum().backward()
        wait()

    benchmark.pedantic(step, warmup_rounds=1, rounds=5)
    benchmark.extra_info.update(rows=SHAPE[0], V=SHAPE[1], dtype=str(DTYPE))

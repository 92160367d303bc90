"""From tokens to sequences: time of forward and backward, beside what PyTorch offers for packed sequences."""

import pytest
import torch

import prefcore

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def packed(sequences: int, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.randint(0, longest + 1, (sequences,), generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    return torch.randn(int(cu_seqlens[-1]), device=DEVICE, requires_grad=True), cu_seqlens.to(DEVICE)


def fused(x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    return prefcore.sequence_reduce(x, cu_seqlens, "sum")


def scattered(x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    sequences = cu_seqlens.shape[0] - 1
    owner = torch.repeat_interleave(torch.arange(sequences, device=x.device), cu_seqlens.diff(), output_size=x.shape[0])
    return x.new_zeros(sequences).index_add(0, owner, x)


def fused_mean(x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    return prefcore.aggregate(x, cu_seqlens, "seq_mean_token_mean")


def scattered_mean(x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    lengths = cu_seqlens.diff()
    return (scattered(x, cu_seqlens) / lengths.clamp(min=1)).sum() / (lengths > 0).sum()


@pytest.mark.parametrize(("sequences", "longest"), [(16, 1024), (4096, 256), (16, 65536)])
@pytest.mark.parametrize(
    "provider",
    [fused, scattered, fused_mean, scattered_mean],
    ids=["sequence_reduce: prefcore", "sequence_reduce: index_add", "aggregate: prefcore", "aggregate: index_add"],
)
def test_ragged_sums(provider, sequences, longest, benchmark):
    x, cu_seqlens = packed(sequences, longest)
    wait = torch.cuda.synchronize if CUDA else lambda: None

    def step():
        x.grad = None
        provider(x, cu_seqlens).sum().backward()
        wait()

    benchmark.pedantic(step, warmup_rounds=2, rounds=20)
    benchmark.extra_info.update(T=x.shape[0], S=sequences)

"""Keys of a shared prompt, one copy per response: time of forward and backward, beside indexing by PyTorch."""

import pytest
import torch

import prefcore

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def keys_of(prompt: int, responses: int, length: int) -> torch.Tensor:
    """The keys that each response sees, its prompt's and its own, of tokens packed as prompt, then responses."""
    own = torch.arange(responses * length).view(responses, length) + prompt
    index = torch.cat([torch.arange(prompt).expand(responses, -1), own], dim=1)
    return index.flatten().to(device=DEVICE, dtype=torch.int32)


def gathered(x: torch.Tensor, index: torch.Tensor, inverse: prefcore.RowInverse) -> torch.Tensor:
    return prefcore.gather_rows(x, index, inverse=inverse)


def gathered_and_inverted(x: torch.Tensor, index: torch.Tensor, inverse: prefcore.RowInverse) -> torch.Tensor:
    return prefcore.gather_rows(x, index)


def selected(x: torch.Tensor, index: torch.Tensor, inverse: prefcore.RowInverse) -> torch.Tensor:
    return x.index_select(0, index)


def indexed(x: torch.Tensor, index: torch.Tensor, inverse: prefcore.RowInverse) -> torch.Tensor:
    return x[index]


@pytest.mark.parametrize(("prompt", "responses", "length"), [(4096, 4, 3072), (4096, 64, 192), (512, 2, 256)])
@pytest.mark.parametrize(
    "provider",
    [gathered, gathered_and_inverted, selected, indexed],
    ids=["prefcore, inverse given", "prefcore", "index_select", "indexing"],
)
def test_shared_keys(provider, prompt, responses, length, benchmark):
    index = keys_of(prompt, responses, length)
    tokens = prompt + responses * length
    x = torch.randn(tokens, 1024, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    inverse = prefcore.invert_rows(index, tokens)
    grad = torch.randn(index.shape[0], 1024, device=DEVICE, dtype=torch.bfloat16)
    wait = torch.cuda.synchronize if CUDA else lambda: None

    def step():
        torch.autograd.grad(provider(x, index, inverse), x, grad)
        wait()

    benchmark.pedantic(step, warmup_rounds=2, rounds=20)
    benchmark.extra_info.update(N=tokens, M=index.shape[0])

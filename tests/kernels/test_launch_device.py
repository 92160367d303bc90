"""Every launch of a Triton kernel is made with its tensors' device current, seen without a second GPU."""

from __future__ import annotations

import contextlib

import pytest
import torch

from prefcore.kernels import logprobs
from prefcore.ops._spec import LogitSpec, Row


class Kernel:
    """In a kernel's place: notes which device is current when it is launched."""

    def __init__(self, current: list[torch.Tensor], seen: list[torch.Tensor | None]) -> None:
        self.current, self.seen = current, seen

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda **arguments: self.seen.append(self.current[-1] if self.current else None)


@pytest.mark.parametrize("name", ["stats", "weigh", "grad", "stats_grad"])
def test_the_tensors_device_is_current_at_a_launch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.Tensor] = []
    seen: list[torch.Tensor | None] = []

    @contextlib.contextmanager
    def device_of(tensor: torch.Tensor):
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(logprobs, f"_{name}_kernel", Kernel(current, seen))
    tile, targets = torch.zeros(3, 40), torch.zeros(3, dtype=torch.int64)
    common = targets, None, None, LogitSpec(40), torch.zeros(len(Row), 3)
    {
        "stats": lambda: logprobs.stats(tile, 0, *common),
        "weigh": lambda: logprobs.weigh(tile, tile, 0, *common, None),
        "grad": lambda: logprobs.grad(tile, tile, 0, *common, None, None),
        "stats_grad": lambda: logprobs.stats_grad(tile, tile, *common),
    }[name]()
    assert len(seen) == 1
    assert seen[0] is tile
    assert not current

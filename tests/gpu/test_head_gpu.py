"""What only a GPU shows of logprobs and linear_logprobs. Their values there: tests/ops, which run on CUDA too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import prefcore

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
ALL = ("entropy", "logsumexp", "is_top1", "mean_logits", "log_sum_sq_probs")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# Schedules with budgets: the default, one that retains some rows, and 1: chunks of rows and slices of the vocabulary.
SCHEDULES = {
    "forward": ("forward", None),
    "frozen": ("frozen", None),
    "frozen in tiles": ("frozen", 1),
    "retain": ("retain", None),
    "retain some": ("retain", 2 << 20),
    "recompute": ("recompute", None),
    "recompute in tiles": ("recompute", 1),
}


class Head:
    """Inputs on the device, and a step over them: values and gradients."""

    def __init__(self, T: int, V: int, schedule: str, budget: int | None, dtype=torch.bfloat16, device=DEVICE) -> None:
        g = torch.Generator().manual_seed(T + V)
        trains = schedule in ("retain", "recompute")
        self.hidden = torch.randn(T, 64, generator=g).to(device, dtype).requires_grad_(schedule != "forward")
        self.weight = (torch.randn(V, 64, generator=g) / 8).to(device, dtype).requires_grad_(trains)
        self.targets = torch.randint(V, (T,), generator=g).to(device)
        self.targets[::7] = -100
        self.upstream = torch.randn(T, generator=g).to(device)
        self.options: dict[str, Any] = {"schedule": schedule, "memory_budget": budget}

    def redraw(self) -> None:
        """Other numbers in the same places."""
        with torch.no_grad():
            for x in (self.hidden, self.weight):
                x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(9)) / 4)
            self.targets.copy_(torch.randint(len(self.weight), self.targets.shape))
            self.upstream.neg_()

    def step(self, rows: slice = slice(None), outputs: tuple[str, ...] = ("entropy",)) -> list[torch.Tensor]:
        stats = prefcore.linear_logprobs(
            self.hidden[rows], self.weight, self.targets[rows], outputs=outputs, **self.options
        )
        values = [x for x in stats if x is not None]
        leaves = [x for x in (self.hidden, self.weight) if x.requires_grad]
        if not leaves:
            return values
        return [x.detach() for x in values] + list(torch.autograd.grad(stats.logps, leaves, self.upstream[rows]))


class Logits:
    """The same of ``logprobs``."""

    def __init__(self, T: int, V: int, dtype=torch.bfloat16, device=DEVICE, inplace: bool = False) -> None:
        g = torch.Generator().manual_seed(T + V)
        self.logits = (3 * torch.randn(T, V, generator=g)).to(device, dtype).requires_grad_()
        self.targets = torch.randint(V, (T,), generator=g).to(device)
        self.targets[::7] = -100
        self.upstream = torch.randn(T, generator=g).to(device)
        self.inplace = inplace

    def redraw(self) -> None:
        with torch.no_grad():
            self.logits.copy_(torch.randn(self.logits.shape, generator=torch.Generator().manual_seed(9)))
        self.targets.copy_(torch.randint(self.logits.shape[1], self.targets.shape))
        self.upstream.neg_()

    def step(self, rows: slice = slice(None), outputs: tuple[str, ...] = ALL) -> list[torch.Tensor]:
        logits = self.logits[rows]
        given = logits.clone() if self.inplace else logits
        stats = prefcore.logprobs(given, self.targets[rows], outputs=outputs, inplace=self.inplace)
        (grad,) = torch.autograd.grad(stats.logps, logits, self.upstream[rows])
        return [x.detach() for x in stats if x is not None] + [grad]


class Divergence(Head):
    """The same of ``linear_divergence``: the gradient of one side, the other being the reference."""

    def __init__(self, T: int, V: int, kind: str, budget: int | None, **kw) -> None:
        super().__init__(T, V, "auto", budget, **kw)
        self.hidden.requires_grad_()
        self.weight.requires_grad_()
        self.other = [x.detach().roll(1, 0) for x in (self.hidden, self.weight)]
        self.kind = kind

    def step(self, rows: slice = slice(None), outputs: tuple[str, ...] = ()) -> list[torch.Tensor]:
        hidden, weight = self.other
        stats = prefcore.linear_divergence(
            self.hidden[rows], self.weight, hidden[rows], weight, self.targets[rows], kind=self.kind, **self.options
        )
        grads = torch.autograd.grad(stats.divergence, (self.hidden, self.weight), self.upstream[rows])
        return [x.detach() for x in stats if x is not None] + list(grads)


CASES: dict[str, Callable[..., Head | Logits]] = {
    "logprobs": lambda T, V, **kw: Logits(T, V, **kw),
    "logprobs in place": lambda T, V, **kw: Logits(T, V, inplace=True, **kw),
    **{name: lambda T, V, chosen=chosen, **kw: Head(T, V, *chosen, **kw) for name, chosen in SCHEDULES.items()},
    "divergence kl": lambda T, V, **kw: Divergence(T, V, "kl_pq", None, **kw),
    "divergence js in tiles": lambda T, V, **kw: Divergence(T, V, "js", 1, **kw),
}
EVERY = pytest.mark.parametrize("case", CASES)


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@EVERY
@DTYPES
@pytest.mark.sanitize
def test_runs_repeat_bitwise(case, dtype):
    given = CASES[case](301, 5000, dtype=dtype)
    first = [x.clone() for x in given.step()]
    for _ in range(4):
        assert same(given.step(), first)


@EVERY
@DTYPES
def test_nothing_waits_for_the_device(case, dtype, no_waits):
    given = CASES[case](301, 5000, dtype=dtype)
    both = ("entropy",), ()
    for outputs in both:
        given.step(outputs=outputs)
    with no_waits():
        for outputs in both:
            given.step(outputs=outputs)


@EVERY
def test_lengths_do_not_recompile(case, compiled):
    given = CASES[case](400, 5000)
    for rows in (1, 150, 400):
        given.step(slice(rows))
    before = compiled()
    assert before > 0
    for rows in range(2, 402, 20):
        given.step(slice(rows))
    assert compiled() == before


@EVERY
def test_a_graph_replays_with_other_inputs(case, capture):
    given = CASES[case](200, 3000)
    replay, results = capture(given.step)
    for _ in range(2):
        given.redraw()
        replay()
        assert same(results, given.step())


@EVERY
def test_a_tensor_on_a_device_that_is_not_current(case, other_device):
    expected = CASES[case](50, 3000).step()
    elsewhere = CASES[case](50, 3000, device=other_device).step()
    assert torch.cuda.current_device() == 0
    assert {x.device for x in elsewhere} == {torch.device(other_device)}
    for a, b in zip(expected, elsewhere, strict=True):
        torch.testing.assert_close(a, b.to(a.device), equal_nan=True)


@pytest.mark.parametrize("schedule", ["forward", "frozen", "retain", "recompute"])
def test_more_than_two_to_the_31st_logits(schedule, room):
    T, V, D = 17_000, 130_000, 16
    room(5 * T * V * 2 / 2**30)
    given = Head(1, 1, schedule, None)
    g = torch.Generator(DEVICE).manual_seed(0)
    # Multiples of 1/8 up to 2: bfloat16 holds the logits exactly, whatever order a product is summed in.
    draw = lambda n, high: torch.randint(-high, high + 1, (n, D), generator=g, device=DEVICE).bfloat16()
    given.hidden = draw(T, 1).requires_grad_(schedule != "forward")
    given.weight = (draw(V, 1) / 8).requires_grad_(schedule in ("retain", "recompute"))
    given.targets = torch.randint(V, (T,), generator=g, device=DEVICE)
    given.upstream = torch.randn(T, generator=g, device=DEVICE)
    given.options["memory_budget"] = 3 * T * V if schedule == "retain" else None
    logps, *grads = given.step(outputs=())
    parts = [given.step(slice(at, at + T // 4), outputs=()) for at in range(0, T, T // 4)]
    assert torch.equal(logps, torch.cat([part[0] for part in parts]))
    assert (logps < 0).all()
    if not grads:
        return
    # Whole and parts are rounded to bfloat16 apart, some of a product's own sums too.
    for whole, *pieces in zip(grads, *(part[1:] for part in parts), strict=True):
        expected = torch.stack([piece.float() for piece in pieces]).sum(0)
        assert (whole.float() - expected).norm() <= 4 * torch.finfo(torch.bfloat16).eps * expected.norm()


def test_logprobs_of_more_than_two_to_the_31st_logits(room):
    V = 131_072
    T = 2**31 // V + 3
    room(4 * T * V * 2 / 2**30)
    last = Logits(3, V)
    given = Logits(3, 8)
    given.logits = torch.zeros(T, V, dtype=torch.bfloat16, device=DEVICE)
    given.logits[-3:] = last.logits.detach()
    given.logits.requires_grad_()
    given.targets = torch.cat([last.targets.new_zeros(T - 3), last.targets])
    given.upstream = torch.cat([last.upstream.new_ones(T - 3), last.upstream])
    *values, grad = given.step()
    *expected, expected_grad = last.step()
    assert same([x[-3:] for x in values], expected)
    assert torch.equal(grad[-3:], expected_grad)
    assert (grad[:-3, 1] == grad[0, 1]).all()


def test_a_graph_cannot_read_a_count_back(capture):
    given = Head(64, 500, "retain", None)
    given.options["drop_zero_rows"] = True
    with pytest.raises(RuntimeError, match="drop_zero_rows"):
        capture(given.step)
    torch.cuda.synchronize()
    assert torch.isfinite(given.step()[0]).all()  # and the device is as it was

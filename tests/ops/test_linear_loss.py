"""linear_loss against float64 autograd through its oracle, at every tiling, and what it promises of work and memory."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import prefcore
from prefcore import _impl, reference
from prefcore.losses import dpo, ipo
from prefcore.ops import _plan, _walk
from prefcore.testing import assert_no_worse_than

IGNORE = -100
ALL = ("entropy", "logsumexp", "is_top1", "mean_logits", "log_sum_sq_probs")
CPU = pytest.param("cpu", "cpu", id="cpu")
interpreted = pytest.mark.skipif(
    not _impl.interpreting(), reason="Triton's interpreter is off: TRITON_INTERPRET=1 turns it on"
)
TRITON = pytest.param("triton", "cpu", id="triton-interpreted", marks=interpreted)
CUDA = pytest.param("triton", "cuda", id="triton-cuda", marks=pytest.mark.gpu)
EVERY = pytest.mark.parametrize(("impl", "device"), [CPU, TRITON, CUDA])
NATIVE = pytest.mark.parametrize(("impl", "device"), [CPU, CUDA])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
V, D = 1300, 8


LARGE = 12  # batches of so many groups have one that is larger than the budgets below


def pairs(count: int, generator: torch.Generator) -> list[list[int]]:
    """Tokens of the two sequences of each group."""
    groups = torch.randint(1, 30, (count, 2), generator=generator).tolist()
    return groups if count < LARGE else [*groups[:5], [170, 90], *groups[6:]]


def mixed(count: int, generator: torch.Generator) -> list[list[int]]:
    """1 to 16 sequences a group, some of them empty."""
    sizes = torch.randint(1, 17, (count,), generator=generator).tolist()
    groups = [torch.randint(0, 6, (n,), generator=generator).tolist() for n in sizes]
    return groups if count < LARGE else [*groups[:5], [60] * 5, *groups[6:]]


@dataclasses.dataclass
class Case:
    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    cu_groups: torch.Tensor
    bias: torch.Tensor | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    train_head: bool = True
    constants: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)  # of tokens, sequences and groups

    def to(self, device: str) -> Case:
        def move(x: Any) -> Any:
            if isinstance(x, dict):
                return {k: move(v) for k, v in x.items()}
            return x.to(device) if isinstance(x, torch.Tensor) else x

        return Case(**{f.name: move(getattr(self, f.name)) for f in dataclasses.fields(self)})


def make(
    groups: list[list[int]] | Callable[..., list[list[int]]],
    count: int = 12,
    dtype: torch.dtype = torch.float32,
    *,
    vocab: int = V,
    width: int = D,
    extras: str = "",
    train_head: bool = True,
    ignored: bool = True,
) -> Case:
    """A seeded case of ``count`` groups; ``extras`` names any of bias, temperature, temperatures, softcap, scale."""
    g = torch.Generator().manual_seed(count)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    lengths = groups(count, g) if callable(groups) else groups
    flat = [n for group in lengths for n in group]
    T, S, G = sum(flat), len(flat), len(lengths)
    targets = torch.randint(0, vocab, (T,), generator=g)
    if ignored:
        targets[2::5] = IGNORE
    case = Case(
        randn(T, width).to(dtype),
        randn(vocab, width).to(dtype),
        targets,
        torch.tensor([0, *itertools.accumulate(flat)], dtype=torch.int32),
        torch.tensor([0, *itertools.accumulate(map(len, lengths))], dtype=torch.int32),
        train_head=train_head,
    )
    case.constants = {
        "old": randn(T) - 5,
        "reference": randn(S) - 40,
        "advantage": randn(S),
        "label": torch.rand(S, generator=g, dtype=torch.float64),
    }
    wanted = set(extras.split())
    if "bias" in wanted:
        case.bias = randn(vocab).to(dtype)
    if "temperature" in wanted:
        case.options["temperature"] = 0.7
    if "temperatures" in wanted:
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        case.options["temperature"] = (torch.rand(T, generator=g, dtype=torch.float64) + 0.5).to(acc)
    if "softcap" in wanted:
        case.options["softcap"] = 3.0
    if "scale" in wanted:
        case.options["logit_scale"] = 0.6
    assert case.cu_groups.shape[0] == G + 1
    return case


def pairwise(method, case, stats, tile):
    logps = prefcore.sequence_reduce(stats.logps, tile.cu_seqlens, "sum")
    ref = case.constants["reference"][tile.sequences].to(logps.dtype)
    return method(*logps.view(-1, 2).unbind(1), *ref.view(-1, 2).unbind(1), beta=0.1)


def policy(case, stats, tile):
    """Clipped ratios of tokens, averaged over each sequence."""
    counts = tile.cu_seqlens.diff().long()
    old, advantage = case.constants["old"][tile.tokens], case.constants["advantage"][tile.sequences]
    ratio = (0.1 * (stats.logps - old.to(stats.logps.dtype))).exp()
    advantage = advantage.to(ratio.dtype).repeat_interleave(counts, output_size=ratio.shape[0])
    terms = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return prefcore.sequence_reduce(terms, tile.cu_seqlens, "mean")


def with_entropy(case, stats, tile):
    """A loss of each token, of all that has a gradient."""
    return -stats.logps - 0.3 * stats.entropy + 0.01 * stats.logsumexp.square()


def listwise(case, stats, tile):
    """Cross entropy of a softmax over the responses of each group."""
    scores = 0.2 * prefcore.sequence_reduce(stats.logps, tile.cu_seqlens, "mean")
    labels = case.constants["label"][tile.sequences].to(scores.dtype)
    offsets = tile.cu_groups.tolist()
    return torch.stack(
        [
            -(labels[a:b].softmax(0) * scores[a:b].log_softmax(0)).sum() if b > a else scores.new_zeros(())
            for a, b in itertools.pairwise(offsets)
        ]
    )


CLOSURES = {
    "dpo": (functools.partial(pairwise, dpo), pairs, ()),
    "ipo": (functools.partial(pairwise, ipo), pairs, ()),
    "policy": (policy, mixed, ()),
    "entropy": (with_entropy, mixed, ("entropy", "logsumexp")),
    "listwise": (listwise, mixed, ()),
}


def run(case: Case, closure, op: Any, dtype: torch.dtype | None = None, upstream: float = 1.0, **arguments: Any):
    """Outputs and gradients by name; in ``dtype`` if given."""

    def cast(x: torch.Tensor) -> torch.Tensor:
        return x if dtype is None else x.to(dtype)

    leaves = {"hidden": cast(case.hidden).detach().clone().requires_grad_()}
    for name in ("weight", "bias"):
        if getattr(case, name) is not None:
            leaves[name] = cast(getattr(case, name)).detach().clone().requires_grad_(case.train_head)
    options = {k: cast(v) if isinstance(v, torch.Tensor) else v for k, v in case.options.items()}
    out = op(
        leaves["hidden"], leaves["weight"], case.targets, case.cu_seqlens, functools.partial(closure, case),
        cu_groups=case.cu_groups, bias=leaves.get("bias"), **options, **arguments,
    )  # fmt: skip
    wanted = {k: v for k, v in leaves.items() if v.requires_grad}
    grads: Any = [None] * len(wanted)
    if out.loss.requires_grad or op is prefcore.linear_loss:  # the oracle's does not where all groups are empty
        grads = torch.autograd.grad(out.loss * upstream, list(wanted.values()), allow_unused=True)
    named = {"loss": out.loss, "losses": out.losses}
    named |= {k: v for k, v in out.stats._asdict().items() if v is not None}
    named |= {
        f"d_{k}": torch.zeros_like(v) if g is None else g for (k, v), g in zip(wanted.items(), grads, strict=True)
    }
    return {k: v.detach().cpu() for k, v in named.items()}


def budget_of(rows: int | None, case: Case) -> int | None:
    """One that holds the logits of so many rows; None for the default."""
    if rows is None:
        return None
    kinds = _plan.types(case.hidden.device, case.hidden.dtype, None)

    def held(budget: int) -> int:
        return _plan.limits(case.weight.shape[0], kinds, False, case.hidden.device, "loop", budget).retained_rows

    return bisect.bisect_left(range(10**9), rows, key=held)


def check(
    case: Case, closure, outputs: tuple[str, ...], impl: str, device: str, upstream: float = 1.0,
    reduction: dict[str, Any] | None = None, **arguments,
):  # fmt: skip
    """Compare everything with the oracle in float64."""
    common = {"outputs": outputs, "upstream": upstream, **(reduction or {})}
    truth = run(case, closure, reference.linear_loss, torch.float64, **common)
    eager = run(case, closure, reference.linear_loss, **common)
    before = case.hidden.clone(), case.weight.clone()
    actual = run(case.to(device), closure, prefcore.linear_loss, impl=impl, **common, **arguments)
    assert all(torch.equal(x, y) for x, y in zip((case.hidden, case.weight), before, strict=True)), "an input changed"
    assert set(actual) == set(truth)
    bands = rounding(case, closure, common, truth)
    for name, value in actual.items():
        if value.dtype != torch.bool:
            assert_no_worse_than(value, eager[name], truth[name], name, band=bands[name])
    return actual


def rounding(case: Case, closure, common: dict[str, Any], truth: dict[str, torch.Tensor]) -> dict[str, float]:
    """What one rounding of intermediate values does to each result.

    Results move as far as they do, in float64, when the inputs move by one rounding; that may be little by chance. A
    rounded logit is off by eps·|z|, and so is a statistic, a loss by as much times what it sends, and relatively a
    probability and with it a gradient, whose parts, a row of W or of the hidden states each, may cancel and leave their
    own roundings.
    """
    g = torch.Generator().manual_seed(1)
    eps = torch.finfo(case.hidden.dtype).eps
    if not case.hidden.numel():
        return dict.fromkeys(truth, 0.0)

    def moved(x: torch.Tensor) -> torch.Tensor:
        return x.double() * (1 + eps * (torch.randint(0, 2, x.shape, generator=g) * 2 - 1))

    other = dataclasses.replace(case, hidden=moved(case.hidden), weight=moved(case.weight))
    result = run(other, closure, reference.linear_loss, torch.float64, **common)
    bands = {k: (v.double() - truth[k].double()).abs().max().item() for k, v in result.items()}

    hidden, weight = case.hidden.double(), case.weight.double()
    z = (hidden @ weight.t() + (0 if case.bias is None else case.bias)).abs().max()
    magnitude = max(1.0, (z / torch.as_tensor(case.options.get("temperature", 1.0)).min()).item())
    wide = torch.finfo(torch.promote_types(case.hidden.dtype, torch.float32)).eps
    sent, count = sent_by(case, closure, common["outputs"])
    normalizer = common.get("normalizer") or max(count, 1)
    for name in {"logps", *common["outputs"]} & bands.keys():
        bands[name] += eps * magnitude
    bands["losses"] += eps * magnitude * sent
    bands["loss"] += bands["losses"] * count / normalizer
    sent *= abs(common["upstream"]) / normalizer
    for name, part in (("d_hidden", weight), ("d_weight", hidden), ("d_bias", torch.ones(1))):
        if name in bands:
            # `frozen` rounds probabilities to the operands' type, the others the difference onehot - p.
            parts = (wide if case.train_head else eps) * sent * part.abs().max().item()
            bands[name] += (1 + magnitude) * (eps * truth[name].abs().max().item() + parts)
    return bands


def sent_by(case: Case, closure, outputs: tuple[str, ...]) -> tuple[float, int]:
    """The largest gradient that the closure sends to a statistic, and the number of losses."""
    bias = None if case.bias is None else case.bias.double()
    stats = reference.linear_logprobs(
        case.hidden.double(), case.weight.double(), case.targets, bias=bias, outputs=outputs, **case.options
    )
    leaves = [None if x is None else x.requires_grad_() for x in stats[:3]]
    sizes = case.targets, case.cu_seqlens[1:], case.cu_groups[1:]
    tile = prefcore.Tile(*(slice(0, x.shape[0]) for x in sizes), case.cu_seqlens, case.cu_groups)
    losses = closure(case, stats._make((*leaves, *stats[3:])), tile)
    there = [x for x in leaves if x is not None]
    grads = torch.autograd.grad(losses.sum(), there, allow_unused=True) if losses.requires_grad else []
    return max((g.abs().max().item() for g in grads if g is not None), default=0.0), losses.shape[0]


TILINGS = {"one tile": None, "tiles, one group above the budget": 150, "mostly recomputed": 20, "no budget": 0}


@NATIVE
@pytest.mark.quick
@pytest.mark.parametrize("train_head", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("rows", TILINGS.values(), ids=TILINGS)
@pytest.mark.parametrize("name", CLOSURES)
def test_every_loss_at_every_tiling_equals_the_oracle(name, rows, train_head, impl, device):
    closure, groups, outputs = CLOSURES[name]
    case = make(groups, 24, train_head=train_head, extras="bias")
    budget = budget_of(rows, case)
    check(case, closure, outputs, impl, device, memory_budget=budget)


@EVERY
@DTYPES
@pytest.mark.parametrize("name", ["dpo", "entropy"])
def test_every_dtype(name, dtype, impl, device):
    closure, groups, outputs = CLOSURES[name]
    few = (impl, device) == ("triton", "cpu")  # the interpreter takes a millisecond or more for each row
    case = make([[4, 3], [2, 5]] if few else groups, 24, dtype, extras="bias", vocab=300 if few else V)
    for rows in (None, 0 if few else 150):
        budget = budget_of(rows, case)
        actual = check(case, closure, outputs, impl, device, memory_budget=budget)
        assert actual["d_weight"].dtype == actual["d_hidden"].dtype == actual["d_bias"].dtype == dtype
        assert actual["loss"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@NATIVE
@pytest.mark.parametrize(
    "extras", ["", "bias", "temperature", "temperatures", "softcap", "scale", "bias temperatures softcap scale"]
)
@pytest.mark.parametrize("name", ["policy", "entropy"])
def test_every_option(name, extras, impl, device):
    closure, groups, outputs = CLOSURES[name]
    for train_head in (True, False):
        case = make(groups, 20, extras=extras, train_head=train_head)
        for rows in (None, 150, 10):
            budget = budget_of(rows, case)
            check(case, closure, outputs, impl, device, memory_budget=budget)


@settings(max_examples=25, deadline=None)
@given(
    groups=st.lists(st.lists(st.integers(0, 12), min_size=0, max_size=5), max_size=12),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    rows=st.sampled_from([None, 0, 1, 7, 130]),
    vocab=st.integers(1, 1400),
    extras=st.sets(st.sampled_from(["bias", "temperature", "softcap", "scale"])),
    name=st.sampled_from(["policy", "entropy", "listwise"]),
    train_head=st.booleans(),
)
def test_combinations(groups, dtype, rows, vocab, extras, name, train_head):
    case = make(groups, len(groups), dtype, vocab=vocab, extras=" ".join(extras), train_head=train_head)
    closure, _, outputs = CLOSURES[name]
    if not groups:
        closure = with_entropy
        outputs = ("entropy", "logsumexp")
    budget = budget_of(rows, case)
    check(case, closure, outputs, "cpu", "cpu", memory_budget=budget)


@NATIVE
@pytest.mark.parametrize("rows", [None, 150, 20, 0])
def test_float64_agrees_to_the_last_digits(rows, impl, device):
    case = make(mixed, 20, torch.float64, extras="bias temperatures softcap scale")
    closure, outputs = with_entropy, ("entropy", "logsumexp")
    truth = run(case, closure, reference.linear_loss, outputs=outputs)
    budget = budget_of(rows, case)
    actual = run(case.to(device), closure, prefcore.linear_loss, outputs=outputs, memory_budget=budget, impl=impl)
    for name, value in actual.items():
        torch.testing.assert_close(value, truth[name], rtol=1e-11, atol=1e-13, msg=name)


@NATIVE
def test_float64_gradcheck(impl, device):
    case = make([[2, 0], [3], [1, 2]], 3, torch.float64, vocab=11, width=3, extras="bias softcap").to(device)
    closure = functools.partial(with_entropy, case)

    def op(hidden, weight, bias):
        return prefcore.linear_loss(
            hidden, weight, case.targets, case.cu_seqlens, closure, cu_groups=case.cu_groups, bias=bias, impl=impl,
            outputs=("entropy", "logsumexp"), memory_budget=budget_of(4, case), **case.options,
        ).loss  # fmt: skip

    leaves = [x.requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    assert torch.autograd.gradcheck(op, leaves, nondet_tol=0.0)


@NATIVE
@pytest.mark.parametrize("rows", [None, 150, 20])
def test_same_inputs_give_the_same_bits(rows, impl, device):
    case = make(mixed, 20, torch.bfloat16, extras="bias").to(device)
    budget = budget_of(rows, case)
    first, second = (
        run(case, policy, prefcore.linear_loss, outputs=ALL, memory_budget=budget, impl=impl) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@NATIVE
def test_offsets_may_be_lists_or_tensors_and_groups_are_sequences_by_default(impl, device):
    case = make([[5], [0], [7], [4]], 4).to(device)
    results = []
    for cu_seqlens in (case.cu_seqlens, case.cu_seqlens.cpu(), case.cu_seqlens.tolist(), (0, 5, 5, 12, 16)):
        for cu_groups in (None, case.cu_groups, case.cu_groups.tolist()):
            other = dataclasses.replace(case, cu_seqlens=cu_seqlens, cu_groups=cu_groups)
            results.append(run(other, policy, prefcore.linear_loss, impl=impl, memory_budget=0))
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


def test_the_closure_sees_its_tile_of_the_batch():
    case = make([[30, 40], [100], [2, 0, 50], [], [60]], 5)
    seen = []

    def closure(stats, tile):
        seen.append(tile)
        assert stats.logps.requires_grad
        assert stats.entropy.shape == stats.logps.shape
        assert stats.logsumexp is None
        assert stats.is_top1.dtype == torch.bool
        assert tile.cu_seqlens.dtype == tile.cu_groups.dtype == torch.int32
        assert tile.cu_seqlens[0] == tile.cu_groups[0] == 0
        assert tile.cu_seqlens[-1] == stats.logps.shape[0] == tile.tokens.stop - tile.tokens.start
        assert tile.cu_groups[-1] == tile.sequences.stop - tile.sequences.start
        assert torch.equal(
            tile.cu_seqlens, case.cu_seqlens[tile.sequences.start : tile.sequences.stop + 1] - tile.tokens.start
        )
        assert tile.cu_groups.shape[0] - 1 == tile.groups.stop - tile.groups.start
        return prefcore.sequence_reduce(stats.logps, tile.cu_seqlens)

    out = prefcore.linear_loss(
        case.hidden.requires_grad_(), case.weight, case.targets, case.cu_seqlens, closure, cu_groups=case.cu_groups,
        outputs=("entropy", "is_top1"), memory_budget=budget_of(130, case),
    )  # fmt: skip
    assert [(t.groups.start, t.groups.stop) for t in seen] == [(0, 1), (1, 2), (2, 5)]
    assert out.losses.shape == (7,)
    assert not out.losses.requires_grad
    assert not out.stats.logps.requires_grad
    assert out.loss.requires_grad


def test_tiles_hold_whole_groups_and_cover_the_batch():
    offsets = [0, 3, 3, 10, 210, 210, 213, 220, 330]
    assert _plan.loop_tiles(offsets, 13) == [(0, 3), (3, 5), (5, 7), (7, 8)]
    assert _plan.loop_tiles(offsets, 1000) == [(0, 8)]
    assert _plan.loop_tiles([0], 5) == []
    assert _plan.loop_tiles([0, 0, 0], 5) == [(0, 2)]
    assert _plan.loop_tiles([0, 0, 0, 7], 5) == [(0, 2), (2, 3)]


@NATIVE
@pytest.mark.parametrize("groups", [[], [[]], [[0]], [[], [0, 0], []]], ids=str)
@pytest.mark.parametrize("train_head", [True, False])
def test_batches_without_tokens(groups, train_head, impl, device):
    case = make(groups, len(groups), train_head=train_head).to(device)
    actual = run(case, policy, prefcore.linear_loss, outputs=ALL, impl=impl)
    S = case.cu_seqlens.shape[0] - 1
    assert actual["losses"].shape == (S,)
    assert actual["logps"].shape == actual["is_top1"].shape == (0,)
    assert actual["is_top1"].dtype == torch.bool
    assert actual["loss"] == 0
    assert all((value == 0).all() for name, value in actual.items() if name.startswith("d_"))


@NATIVE
def test_rows_that_nobody_scores_are_inert_whatever_they_hold(impl, device):
    case = make(mixed, 20, extras="bias")
    truth = run(case, policy, reference.linear_loss, torch.float64)
    case.hidden[case.targets == IGNORE] = torch.nan
    for rows in (None, 20):
        budget = budget_of(rows, case)
        actual = run(case.to(device), policy, prefcore.linear_loss, impl=impl, memory_budget=budget)
        for name, value in actual.items():
            torch.testing.assert_close(value.double(), truth[name], rtol=1e-4, atol=1e-5, msg=name)


@NATIVE
@pytest.mark.parametrize("kind", ["some", "all"])
def test_losses_of_weight_zero_take_no_part(kind, impl, device):
    case = make(pairs, 24, extras="bias")
    weights = torch.rand(24)
    weights[: 24 if kind == "all" else 20] = 0
    first = case.cu_seqlens[40].item() if kind == "some" else case.hidden.shape[0]
    truth = run(case, CLOSURES["dpo"][0], reference.linear_loss, torch.float64, weights=weights, normalizer=3)
    there = case.to(device)
    for rows in (None, 150):
        budget = budget_of(rows, case)
        actual = run(
            there, CLOSURES["dpo"][0], prefcore.linear_loss, weights=weights.to(device), normalizer=3, impl=impl,
            memory_budget=budget, drop_zero_rows=True,
        )  # fmt: skip
        assert (actual["d_hidden"][:first] == 0).all()
        for name, value in actual.items():
            torch.testing.assert_close(value.double(), truth[name], rtol=1e-4, atol=1e-6, msg=name)
        if kind == "all":
            assert actual["loss"] == 0
            assert all((value == 0).all() for name, value in actual.items() if name.startswith("d_"))


@pytest.mark.parametrize("normalizer", [None, 7, 2.5, torch.tensor(7), torch.tensor(2.5)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_weights_and_normalizer(normalizer, weighted):
    case = make(mixed, 20)
    weights = torch.rand(case.cu_seqlens.shape[0] - 1) if weighted else None
    arguments = {"weights": weights, "normalizer": normalizer}
    truth = run(case, policy, reference.linear_loss, torch.float64, **arguments)
    actual = run(case, policy, prefcore.linear_loss, memory_budget=budget_of(150, case), **arguments)
    for name, value in actual.items():
        torch.testing.assert_close(value.double(), truth[name], rtol=1e-4, atol=1e-6, msg=name)


def plain(stats, tile):
    """No gradient of it is zero, so that no row is left out."""
    return -prefcore.sequence_reduce(stats.logps, tile.cu_seqlens)


class Watch(TorchDispatchMode):
    """Flops of matrix products, and the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[:2] if name == "mm" else args[1:3]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def watch(case: Case, hidden_grad: bool = True, weight_grad: bool = True, **arguments) -> Watch:
    hidden, weight = case.hidden.requires_grad_(hidden_grad), case.weight.requires_grad_(weight_grad)
    seen = Watch()
    with seen:
        out = prefcore.linear_loss(
            hidden, weight, case.targets, case.cu_seqlens, plain, cu_groups=case.cu_groups, **arguments,
        )  # fmt: skip
        if out.loss.requires_grad:
            out.loss.backward()
    return seen


@pytest.mark.parametrize(
    ("hidden_grad", "weight_grad", "units"), [(True, True, 3), (True, False, 2), (False, True, 2), (False, False, 1)]
)
@pytest.mark.parametrize("rows", [None, 150])
@pytest.mark.parametrize("outputs", [(), ("entropy",)])
def test_work_is_three_units_or_less(hidden_grad, weight_grad, units, rows, outputs):
    case = make([[9, 30], [70], [0, 1, 2, 3]] * 12, 36, ignored=False)
    seen = watch(case, hidden_grad, weight_grad, memory_budget=budget_of(rows, case), outputs=outputs)
    assert seen.flops == units * 2 * case.hidden.shape[0] * D * V


@pytest.mark.parametrize(("train_head", "units"), [(True, 4), (False, 2)])
def test_only_a_group_above_the_budget_is_recomputed(train_head, units):
    case = make([[40, 30], [300, 200], [60, 70]], 3, ignored=False)
    held = 150
    seen = watch(case, weight_grad=train_head, memory_budget=budget_of(held, case))
    unit, rows = 2 * D * V, case.hidden.shape[0]
    again = (500 - held) if train_head else 0
    assert seen.flops == unit * (rows * (3 if train_head else 2) + again)
    assert seen.flops <= units * unit * rows


def test_no_tensor_is_larger_than_a_tile():
    case = make([[20, 30]] * 40, 40, vocab=3000, width=4, ignored=False)
    held = 200
    for weight_grad in (True, False):
        for outputs in ((), ("entropy",)):
            budget = budget_of(held, case)
            seen = watch(case, weight_grad=weight_grad, memory_budget=budget, outputs=outputs)
            assert seen.largest <= held * 3000
    above = make([[20, 30]] * 3 + [[700, 300]] + [[20, 30]] * 3, 7, vocab=3000, width=4, ignored=False)
    assert watch(above, memory_budget=budget_of(held, above)).largest <= held * 3000


@pytest.mark.parametrize("options", [{}, {"weight_requires_grad": False}, {"hidden_requires_grad": False}], ids=str)
@pytest.mark.parametrize("rows", [None, 150, 20])
def test_the_plan_says_what_the_call_does(options, rows):
    case = make([[40, 30], [300, 200], [60, 70], [1, 0]] * 2, 8, ignored=False)
    budget = budget_of(rows, case) or 10**9
    lengths = [70, 500, 130, 1] * 2
    made = prefcore.plan(
        sum(lengths), D, V, dtype=torch.float32, device="cpu", schedule="loop", memory_budget=budget, groups=lengths,
        **options,
    )  # fmt: skip
    assert made.schedule == "loop"
    grads = [options.get(f"{name}_requires_grad", True) for name in ("hidden", "weight")]
    assert watch(case, *grads, memory_budget=budget).flops == made.flops
    assert made.reason.startswith({None: "1 tile", 150: "6 tile", 20: "7 tile"}[rows]), made.reason


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("upstream", [65536.0, 1e-3, 0.0])
@pytest.mark.parametrize("rows", [None, 150])
def test_loss_scaling_is_exact(upstream, dtype, rows, impl, device):
    """Gradients that their type cannot hold unscaled, as with a loss scale, arrive as if computed in float64."""
    case = make(pairs, 24, dtype, extras="bias", ignored=False)
    case.options["logit_scale"] = 0.05  # flat distributions: no gradient is large
    closure, small = CLOSURES["dpo"][0], 1 / 65536
    truth = run(case, closure, reference.linear_loss, torch.float64, upstream * small)
    budget = budget_of(rows, case)
    actual = run(
        case.to(device), lambda *a: closure(*a) * small, prefcore.linear_loss, None, upstream, impl=impl,
        memory_budget=budget,
    )  # fmt: skip
    finest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # between two subnormal results
    eager = run(case, closure, reference.linear_loss)
    exact = run(case, closure, reference.linear_loss, torch.float64)
    bands = rounding(case, closure, {"outputs": (), "upstream": upstream * small}, truth)
    for name in ("d_hidden", "d_weight", "d_bias"):
        # The error of eager at a scale where nothing underflows, moved to this one.
        error = (eager[name].double() - exact[name]).abs().max().item() * upstream * small
        assert (actual[name].double() - truth[name]).abs().max() <= 2 * error + 4 * bands[name] + finest, name
        if upstream == 0:
            assert (actual[name] == 0).all()


@pytest.mark.parametrize("upstream", [65536.0, 1.0])
def test_half_operands_lose_nothing_to_small_gradients(monkeypatch, upstream):
    """A GPU multiplies float16 as it lies; here a CPU is made to."""
    half = _plan.Types(torch.float16, torch.float16, None)
    case = make(pairs, 8, torch.float16, extras="bias", vocab=300)
    closure, small = CLOSURES["dpo"][0], 1e-7
    truth = run(case, closure, reference.linear_loss, torch.float64, upstream * small)
    monkeypatch.setattr(_plan, "types", lambda *a: half)
    for rows in (None, 140):
        budget = None if rows is None else rows * 300 * 2 * 8 // 7 + 1
        buffer = torch.zeros(300, D)
        out = prefcore.linear_loss(
            case.hidden, case.weight.requires_grad_(), case.targets, case.cu_seqlens,
            lambda stats, tile: functools.partial(closure, case)(stats, tile) * small,
            cu_groups=case.cu_groups, bias=case.bias, memory_budget=budget, weight_grad_out=buffer,
        )  # fmt: skip
        (out.loss * upstream).backward()
        error = (buffer.double() - truth["d_weight"]).norm() / truth["d_weight"].norm()
        assert error < 4 * torch.finfo(torch.float16).eps  # each factor is rounded, h·g and onehot - p


@NATIVE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("promise", [False, True])
def test_weight_grad_out_sums_micro_batches(promise, dtype, impl, device):
    """A tied weight's main gradient: float32, over two micro-batches whose normalizer is the whole step's."""
    cases = [make(pairs, count, dtype) for count in (24, 17)]
    cases[1].weight = cases[0].weight
    closure = CLOSURES["dpo"][0]
    for rows in (None, 150):
        start = torch.randn(V, D)
        buffer = start.clone().to(device)
        weight = cases[0].weight.to(device).requires_grad_()
        expected = torch.zeros(V, D, dtype=torch.float64)
        slack, additions = 0.0, 0

        def counted(case, stats, tile):
            nonlocal additions
            additions += (
                1 + stats.logps.shape[0] // 128
            )  # a GEMM adds to its output block by block of the inner dimension
            return closure(case, stats, tile)

        for case in cases:
            common = {"normalizer": 41}
            truth = run(case, closure, reference.linear_loss, torch.float64, 64.0, **common)
            eager = run(case, closure, reference.linear_loss, None, 64.0, **common)["d_weight"]
            expected += truth["d_weight"]
            band = rounding(case, closure, {"outputs": (), "upstream": 64.0, **common}, truth)["d_weight"]
            slack += 2 * (eager.double() - truth["d_weight"]).abs().max().item() + 4 * band
            there = case.to(device)
            version = buffer._version
            out = prefcore.linear_loss(
                there.hidden.requires_grad_(), weight, there.targets, there.cu_seqlens,
                functools.partial(counted, there), cu_groups=there.cu_groups, weight_grad_out=buffer, impl=impl,
                memory_budget=budget_of(rows, case),
                grad_scale=64.0 if promise else None, **common,
            )  # fmt: skip
            assert (buffer._version > version) == promise
            (out.loss * 64).backward()
            assert buffer._version > version
        assert weight.grad is None
        slack += torch.finfo(torch.float32).eps * additions * max(expected.abs().max().item(), start.abs().max().item())
        assert (buffer.cpu().double() - start - expected).abs().max() <= slack


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [256.0, torch.tensor(0.25)], ids=str)
@pytest.mark.parametrize("rows", [None, 150])
def test_a_known_gradient_is_finished_in_the_forward(rows, scale, dtype, impl, device):
    case = make(mixed, 20, dtype, extras="bias")
    check(
        case, policy, (), impl, device, float(scale), {"normalizer": 100.0}, grad_scale=scale,
        memory_budget=budget_of(rows, case),
    )  # fmt: skip


@pytest.mark.parametrize("promised", [1.0, torch.tensor(1.0)], ids=str)
def test_another_gradient_than_the_known_one_is_refused(promised):
    case = make(mixed, 4)
    with pytest.raises(ValueError, match=r"grad_scale was 1\.0, but the gradient that arrived is 2\.0"):
        run(case, policy, prefcore.linear_loss, None, 2.0, normalizer=10, grad_scale=promised)


@NATIVE
@pytest.mark.parametrize("rows", [None, 150])
def test_a_backward_may_be_repeated_where_the_graph_is_kept(rows, impl, device):
    case = make(mixed, 20, extras="bias").to(device)
    budget = budget_of(rows, case)
    leaves = [x.requires_grad_() for x in (case.hidden, case.weight, case.bias)]

    def call(**arguments):
        return prefcore.linear_loss(
            case.hidden, case.weight, case.targets, case.cu_seqlens, functools.partial(policy, case), impl=impl,
            cu_groups=case.cu_groups, bias=case.bias, memory_budget=budget, **arguments,
        ).loss  # fmt: skip

    loss = call()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    doubled = torch.autograd.grad(loss * 2, leaves, retain_graph=True)
    last = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, last, strict=True))
    assert all(torch.equal(2 * a, b) for a, b in zip(first, doubled, strict=True))
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(loss, leaves)
    buffer = torch.zeros_like(case.weight)
    loss = call(weight_grad_out=buffer)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(buffer, 2 * first[1])
    loss = call(grad_scale=1.0, normalizer=20)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [x.clone() for x in first]
    for x in first:
        x.zero_()  # what was handed out is the caller's
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, leaves), kept, strict=True))


def test_where_torch_does_not_tell_whether_the_graph_is_kept_gradients_are_copied(monkeypatch):
    case = make(mixed, 4)
    expected = run(case, policy, prefcore.linear_loss)
    monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    actual = run(case, policy, prefcore.linear_loss)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_double_backward_is_refused():
    case = make(mixed, 4)
    out = prefcore.linear_loss(
        case.hidden.requires_grad_(), case.weight, case.targets, case.cu_seqlens, functools.partial(policy, case)
    )
    for loss in (out.loss * 2, out.loss.square()):
        (grad,) = torch.autograd.grad(loss, case.hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


@NATIVE
def test_without_grad_there_is_the_same_loss_and_no_graph(impl, device):
    case = make(mixed, 20, extras="bias").to(device)
    expected = run(case, policy, prefcore.linear_loss, outputs=ALL, impl=impl)
    arguments = {"cu_groups": case.cu_groups, "bias": case.bias, "outputs": ALL, "impl": impl}
    inputs = case.hidden, case.weight.requires_grad_(), case.targets, case.cu_seqlens, functools.partial(policy, case)
    buffer = torch.zeros_like(case.weight)
    with torch.no_grad():
        out = prefcore.linear_loss(*inputs, weight_grad_out=buffer, grad_scale=1.0, normalizer=5, **arguments)
    assert (buffer == 0).all()
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.losses.cpu(), expected["losses"])
    for name, value in out.stats._asdict().items():
        torch.testing.assert_close(value.cpu(), expected[name])


def test_autocast_casts_as_linear_does():
    case = make(pairs, 24, extras="bias")
    leaves = [x.requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    closure = functools.partial(CLOSURES["dpo"][0], case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = prefcore.linear_loss(
            case.hidden, case.weight, case.targets, case.cu_seqlens, closure, cu_groups=case.cu_groups, bias=case.bias
        )
    out.loss.backward()
    low = dataclasses.replace(case, **{k: getattr(case, k).detach().bfloat16() for k in ("hidden", "weight", "bias")})
    plain = run(low, CLOSURES["dpo"][0], prefcore.linear_loss)
    assert torch.equal(out.loss.detach(), plain["loss"])
    for leaf, name in zip(leaves, ("d_hidden", "d_weight", "d_bias"), strict=True):
        assert leaf.grad.dtype == torch.float32
        # Of the weight no cast rounds the sums.
        assert torch.equal(leaf.grad.bfloat16(), plain[name])


def test_a_compiled_caller_breaks_its_graph_and_gets_the_same():
    torch.compiler.reset()

    def step(case):
        out = prefcore.linear_loss(
            case.hidden.tanh(), case.weight, case.targets, case.cu_seqlens, functools.partial(policy, case),
            cu_groups=case.cu_groups,
        )  # fmt: skip
        return out.loss * 2, out.losses

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for count in (6, 9, 12):
        case = make(mixed, count)
        results = []
        for function in (step, torch.compile(step, backend=backend, dynamic=True)):
            case.hidden = case.hidden.detach().requires_grad_()
            loss, losses = function(case)
            loss.backward()
            results.append((loss.detach(), losses, case.hidden.grad))
        torch.testing.assert_close(results[1], results[0])
    assert len(graphs) == 2  # before the call and after it, for every size


def test_a_checkpoint_around_the_call_runs_no_tile_again():
    from torch.utils.checkpoint import checkpoint

    case = make(pairs, 24)
    budget, calls = budget_of(150, case), []

    def loss_fn(stats, tile):
        calls.append(tile.groups)
        return policy(case, stats, tile)

    def body(hidden):
        offsets = {"cu_groups": case.cu_groups, "memory_budget": budget}
        return prefcore.linear_loss(hidden, case.weight, case.targets, case.cu_seqlens, loss_fn, **offsets).loss

    hidden = case.hidden.detach().requires_grad_()
    (expected,) = torch.autograd.grad(body(hidden), hidden)
    tiles = len(calls)
    assert tiles > 2
    (got,) = torch.autograd.grad(checkpoint(body, hidden, use_reentrant=False), hidden)
    assert len(calls) == 2 * tiles  # nothing of it is saved, so nothing is computed again
    assert torch.equal(got, expected)


def test_what_is_changed_after_the_call_changes_no_gradient():
    case = make(mixed, 6)
    normalizer = torch.tensor(3.0)

    def loss_fn(stats, tile):
        losses = policy(case, stats, tile)
        with torch.no_grad():
            stats.logps.zero_()
        return losses

    hidden, offsets = case.hidden.detach().requires_grad_(), {"cu_groups": case.cu_groups}
    arguments = case.weight, case.targets, case.cu_seqlens
    out = prefcore.linear_loss(hidden, *arguments, loss_fn, normalizer=normalizer, **offsets)
    plain = prefcore.linear_loss(hidden, *arguments, functools.partial(policy, case), normalizer=3.0, **offsets)
    assert torch.equal(out.stats.logps, plain.stats.logps)
    normalizer.mul_(10)
    assert torch.equal(*(torch.autograd.grad(each.loss, hidden)[0] for each in (out, plain)))


def centred(stats, tile):
    """Mixes groups: the mean is the tile's."""
    logps = prefcore.sequence_reduce(stats.logps, tile.cu_seqlens)
    return -(logps - logps.mean()).square()


@pytest.mark.parametrize("rows", [None, 150, 0], ids=["one tile", "some tiles", "a tile each"])
def test_a_closure_that_mixes_groups_is_found(rows, monkeypatch):
    case = make(pairs, 4 if rows == 0 else 24)
    if rows == 0:
        case = make([[200], [300], [150]], 3)
    budget = budget_of(rows, case)
    inputs = case.hidden, case.weight, case.targets, case.cu_seqlens
    arguments = {"cu_groups": case.cu_groups, "memory_budget": budget}
    prefcore.linear_loss(*inputs, centred, **arguments)
    monkeypatch.setenv("PREFCORE_CHECK", "1")
    with pytest.raises(ValueError, match="mixes groups"):
        prefcore.linear_loss(*inputs, centred, **arguments)
    with pytest.raises(ValueError, match="on another tiling"):
        prefcore.linear_loss(*inputs, lambda stats, tile: stats.logps[:2], **arguments)
    for name in ("policy", "listwise"):
        prefcore.linear_loss(*inputs, functools.partial(CLOSURES[name][0], case), **arguments)

    def overflowing(stats, tile):
        losses = centred(stats, tile)
        return torch.where(torch.arange(len(losses)) + tile.sequences.start == 0, torch.inf, losses)

    with pytest.raises(ValueError, match="mixes groups"):
        prefcore.linear_loss(*inputs, overflowing, **arguments)
    prefcore.linear_loss(torch.full_like(case.hidden, torch.nan), *inputs[1:], centred, **arguments)


def test_a_parameter_of_the_closure_is_refused_by_name():
    case = make(mixed, 4)
    beta = torch.tensor(0.1, requires_grad=True)

    squared = beta.exp().square()

    def closure(stats, tile):
        return stats.logps * beta

    inputs = case.hidden.requires_grad_(), case.weight, case.targets, case.cu_seqlens
    with pytest.raises(NotImplementedError, match=r"beta of shape \(\)"):
        prefcore.linear_loss(*inputs, closure)
    with pytest.raises(NotImplementedError, match=r"a tensor of shape \(\)"):
        prefcore.linear_loss(*inputs, lambda stats, tile: stats.logps * squared)
    each = torch.zeros(case.cu_seqlens.shape[0] - 1, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"each of shape"):
        prefcore.linear_loss(*inputs, lambda stats, tile: each)
    prefcore.linear_loss(*inputs, lambda stats, tile: stats.logps * beta.detach())
    with torch.no_grad():
        prefcore.linear_loss(*inputs, closure)


def test_a_constant_closure_has_no_gradient():
    case = make(mixed, 4)
    actual = run(case, lambda case, stats, tile: stats.logps.detach(), prefcore.linear_loss)
    assert actual["loss"] != 0
    assert all((value == 0).all() for name, value in actual.items() if name.startswith("d_"))


def test_a_statistic_may_be_the_loss():
    case = make(mixed, 4)
    check(case, lambda case, stats, tile: stats.logps, (), "cpu", "cpu")


def test_losses_in_float64_are_kept():
    case = make(mixed, 4)
    actual = run(case, lambda case, stats, tile: -stats.logps.double(), prefcore.linear_loss)
    assert actual["losses"].dtype == torch.float64
    assert actual["loss"].dtype == torch.float32


def test_the_reference_serves_by_name():
    case = make(mixed, 6, extras="bias temperature")
    truth = run(case, policy, reference.linear_loss, outputs=("entropy",))
    named = run(case, policy, prefcore.linear_loss, outputs=("entropy",), impl="reference")
    assert all(torch.equal(named[name], value) for name, value in truth.items())


def test_scarce_memory_turns_to_recomputing(monkeypatch, caplog):
    case = make(mixed, 20, extras="bias")
    expected = run(case, policy, prefcore.linear_loss)
    original = _walk.retained_like

    def scarce(hidden, weight, settings, rows):
        if rows:
            raise torch.OutOfMemoryError("no memory")
        return original(hidden, weight, settings, rows)

    monkeypatch.setattr(_walk, "retained_like", scarce)
    actual = run(case, policy, prefcore.linear_loss)
    assert "no memory to retain" in caplog.text
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def good() -> dict[str, Any]:
    return {
        "hidden": torch.randn(4, 8),
        "weight": torch.randn(10, 8),
        "targets": torch.tensor([0, 9, IGNORE, 3]),
        "cu_seqlens": torch.tensor([0, 1, 4], dtype=torch.int32),
        "loss_fn": lambda stats, tile: stats.logps,
    }


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"hidden": [[1.0]]}, TypeError, "hidden must be a Tensor"),
        ({"hidden": torch.randn(2, 2, 8), "targets": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, r"\[T, D\]"),
        ({"weight": torch.randn(10, 7)}, ValueError, r"weight \[V, D\] with D = 8"),
        ({"weight": torch.randn(10, 8).double()}, ValueError, "weight must be float64 beside float64"),
        ({"targets": torch.tensor([0, 10, IGNORE, 3])}, ValueError, "got 10 at row 1"),
        ({"cu_seqlens": torch.tensor([0, 1, 4])}, ValueError, "cu_seqlens must be int32"),
        ({"cu_seqlens": torch.tensor([[0, 4]], dtype=torch.int32)}, ValueError, "cu_seqlens must be int32"),
        ({"cu_seqlens": [0, 1, 3]}, ValueError, "cu_seqlens must end at the number of rows, 4, got 3"),
        ({"cu_seqlens": [1, 4]}, ValueError, "cu_seqlens must start at 0"),
        ({"cu_seqlens": [0, 3, 2, 4]}, ValueError, "cu_seqlens must not decrease"),
        ({"cu_seqlens": []}, ValueError, "cu_seqlens must have"),
        ({"cu_seqlens": [0, 4.0]}, TypeError, "cu_seqlens must be a Tensor or a list of ints"),
        ({"cu_seqlens": None}, TypeError, "cu_seqlens must be a Tensor or a list of ints, got NoneType"),
        ({"cu_groups": [0, 1]}, ValueError, "cu_groups must end at the number of rows, 2"),
        ({"cu_groups": 2}, TypeError, "cu_groups"),
        ({"loss_fn": None}, TypeError, "loss_fn must be callable"),
        ({"loss_fn": lambda stats, tile: 0.0}, TypeError, "loss_fn must return a Tensor, got float"),
        ({"loss_fn": lambda stats, tile: stats.logps.sum()}, ValueError, "unreduced losses"),
        ({"loss_fn": lambda stats, tile: stats.logps[:, None]}, ValueError, "unreduced losses"),
        ({"loss_fn": lambda stats, tile: stats.logps.half()}, ValueError, "float32 or float64"),
        ({"loss_fn": lambda stats, tile: stats.logps.to("meta")}, ValueError, "on cpu"),
        ({"weights": [1.0]}, TypeError, "weights"),
        ({"weights": torch.ones(3)}, ValueError, "weights has 3 entries, but loss_fn returned 4"),
        ({"weights": torch.ones(5)}, ValueError, "weights has 5 entries, but loss_fn returned 4"),
        ({"weights": torch.ones(4, dtype=torch.int64)}, ValueError, "float dtype"),
        ({"weights": torch.ones(4, requires_grad=True)}, NotImplementedError, "weights"),
        ({"normalizer": 0}, ValueError, "normalizer must be positive"),
        ({"normalizer": math.inf}, ValueError, "normalizer must be positive and finite"),
        ({"normalizer": "1"}, TypeError, "normalizer"),
        ({"normalizer": torch.ones(1)}, ValueError, "normalizer must be 0-dim"),
        ({"normalizer": torch.tensor(-1.0)}, ValueError, "normalizer must be positive"),
        ({"normalizer": torch.tensor(1.0, requires_grad=True)}, NotImplementedError, "normalizer"),
        ({"grad_scale": 1.0}, ValueError, "grad_scale needs normalizer or weights"),
        ({"grad_scale": math.nan, "normalizer": 1}, ValueError, "grad_scale must be finite"),
        ({"grad_scale": torch.ones(2), "normalizer": 1}, ValueError, "grad_scale must be 0-dim"),
        ({"outputs": "entropy"}, TypeError, "sequence of names"),
        ({"temperature": torch.ones(4, requires_grad=True)}, NotImplementedError, "temperature"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"memory_budget": -1}, ValueError, "memory_budget"),
        ({"logits_dtype": torch.float64}, ValueError, "logits_dtype"),
        ({"drop_zero_rows": 1}, TypeError, "drop_zero_rows"),
        ({"process_group": object()}, NotImplementedError, "process_group"),
        ({"weight_grad_out": torch.zeros(10, 8)}, ValueError, "does not require one"),
        ({"impl": "cuda"}, ValueError, "impl of linear_loss"),
        ({"impl": "reference", "memory_budget": 1}, NotImplementedError, "reference"),
        ({"impl": "reference", "grad_scale": 1.0, "normalizer": 1}, NotImplementedError, "reference"),
    ],
)
def test_refusals(change, error, match):
    with pytest.raises(error, match=match):
        prefcore.linear_loss(**(good() | change))

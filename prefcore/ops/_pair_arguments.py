"""Checks that ``divergence`` and ``linear_divergence`` share, and the way of their arguments to either side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor

from prefcore._types import DIVERGENCES, PAIR_OUTPUTS, PairStats
from prefcore.ops._arguments import check_logit_options, check_outputs, row_temperature
from prefcore.ops._checks import check_number, check_type

Kind = Literal["kl_pq", "kl_qp", "js", "alpha", "tv"]
Same = Literal["same"]

# What marks a row to skip where no targets are given: none of the zeros that stand for them.
NO_TOKEN = -1


class Divergence(NamedTuple):
    """Which divergence, as the operators know it: of fewer kinds, after exchanging the sides."""

    kind: str
    mixture: float
    exchanged: bool


def check_kind(kind: str, alpha: float | None, beta: float | None) -> Divergence:
    """Refuse what is no divergence, and a parameter of another one."""
    check_type("kind", kind, str)
    if kind not in DIVERGENCES:
        raise ValueError(f"kind must be one of {DIVERGENCES}, got {kind!r}")
    for name, value, owner, limits in (
        ("alpha", alpha, "alpha", "kl_pq (alpha to 1) and kl_qp (to 0)"),
        ("beta", beta, "js", "kl_pq (js over beta, beta to 0) and kl_qp (over 1 - beta, to 1)"),
    ):
        if value is None:
            continue
        check_number(name, value, " or None")
        if kind != owner:
            raise ValueError(f"{name} belongs to kind={owner!r}, got it with kind={kind!r}")
        if not 0 < value < 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}; its limits are the kinds {limits}")
    mixture = next((float(value) for value in (alpha, beta) if value is not None), 0.5)
    return Divergence("kl" if kind.startswith("kl") else kind, mixture, kind == "kl_qp")


class SideOptions(NamedTuple):
    """How one side's logits become z."""

    temperature: float
    temperatures: Tensor | None  # [T]
    softcap: float | None
    logit_scale: float


def check_sides(
    like: Tensor, rows: Tensor, temperature: float | Tensor, softcap: float | None, logit_scale: float,
    other_temperature: float | Tensor | Same, other_softcap: float | Same | None, other_logit_scale: float | Same,
    ignore_index: int, outputs: Sequence[str],
) -> tuple[SideOptions, SideOptions, frozenset[str]]:  # fmt: skip
    """The options of both sides, and the names of the wanted outputs; ``rows`` has a per-row temperature's shape."""
    names = check_outputs(outputs, PAIR_OUTPUTS)

    def side(prefix: str, temperature: Any, softcap: Any, logit_scale: Any) -> SideOptions:
        try:
            check_logit_options(softcap, logit_scale, ignore_index, ())
            return SideOptions(*row_temperature(temperature, rows, like), softcap, float(logit_scale))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise type(error)(f"{prefix}{error}") from None

    def own(value: Any, first: Any) -> Any:
        return first if isinstance(value, str) and value == "same" else value

    first = side("", temperature, softcap, logit_scale)
    other = side(
        "other_",
        own(other_temperature, temperature),
        own(other_softcap, softcap),
        own(other_logit_scale, logit_scale),
    )
    return first, other, names


def pair_settings(
    divergence: Divergence, sides: tuple[SideOptions, SideOptions], ignore_index: int, names: frozenset[str]
) -> dict[str, Any]:
    """The fields of ``PairSettings``; the sides as the operators know them."""
    first, other = sides
    entropy, other_entropy = ("entropy" in names, "other_entropy" in names)[:: -1 if divergence.exchanged else 1]
    return {
        "kind": divergence.kind,
        "mixture": divergence.mixture,
        "temperature": first.temperature,
        "softcap": first.softcap,
        "logit_scale": first.logit_scale,
        "entropy": entropy,
        "other_temperature": other.temperature,
        "other_softcap": other.softcap,
        "other_logit_scale": other.logit_scale,
        "other_entropy": other_entropy,
        "ignore_index": ignore_index,
    }


def pair_stats(
    values: Sequence[Tensor], divergence: Divergence, names: frozenset[str], targets: bool, rows: Tensor
) -> PairStats:
    """In the order that the caller knows, None where not requested, shaped like ``rows``."""
    value, logps, other_logps, entropy, other_entropy = values
    if divergence.exchanged:
        logps, other_logps, entropy, other_entropy = other_logps, logps, other_entropy, entropy

    def shaped(x: Tensor, wanted: bool) -> Tensor | None:
        return x.view(rows.shape) if wanted else None

    return PairStats(
        value.view(rows.shape),
        shaped(logps, targets),
        shaped(other_logps, targets),
        shaped(entropy, "entropy" in names),
        shaped(other_entropy, "other_entropy" in names),
    )

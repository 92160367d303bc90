"""The attention kernels that run a packed layout: what each can do, what it needs of a layout, and the call.

Each takes ``query [N, H, E]``, ``key [N, Hkv, E]`` and ``value [N, Hkv, Ev]`` of a packed row and returns
``[N, H, Ev]``. A plan is all of a layout that a backend needs, as tensors on the device, made once per batch.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import prefcore
from prefcore.data.packed import Layout, offsets, ranges

_TILE = 128  # FlexAttention's rows and columns per block
# Padding that a batch of segments may hold, relative to its own work, and the work of one more call.
_SLACK = 1.15
_CALL = 64 * 64


class Call(NamedTuple):
    """What one attention layer asks for, beside its tensors."""

    scale: float | None
    dropout: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


class Needs(NamedTuple):
    """What a model asks of its attention: enough to choose a backend before the forward pass."""

    head_size: int
    value_size: int
    windows: frozenset[int | None]
    softcap: bool
    sinks: bool
    dropout: bool  # now: in training mode, and not turned off


class VarlenPlan(NamedTuple):
    cu_q: Tensor  # int32 [Q + 1]
    cu_k: Tensor  # int32 [Q + 1]
    max_q: int
    max_k: int
    keys: (
        Tensor | None
    )  # int32 [Nk], the tokens that each segment attends to, context first; None where no segment has a context
    offsets: Tensor | None  # the inverse of keys, see prefcore.invert_rows
    places: Tensor | None


class FlexPlan(NamedTuple):
    blocks: dict[int | None, Any]  # a BlockMask for each window


class Bucket(NamedTuple):
    """Segments of alike lengths, padded to one batch."""

    size: int
    q: int  # width of the queries
    k: int  # width of the keys
    context: Tensor | None  # int64 [size], lengths of the contexts; None where there are none


@dataclass(eq=False)  # not a tuple, whose entries torch.compile would look at and compile for
class DensePlan:
    query: Tensor  # int32 [sum of size * q], the token in each place, -1 for padding
    key: Tensor  # int32 [sum of size * k]
    back: Tensor  # int32 [N], the place of each token among the padded queries
    inverses: tuple[prefcore.RowInverse, ...]  # of query, key and back
    buckets: tuple[Bucket, ...]
    masks: dict[int | None, tuple[Tensor | None, ...]]  # bool [size, 1, q, k] of each bucket, for each window

    def to(self, device: torch.device | int | str, non_blocking: bool = False) -> DensePlan:
        """As accelerate moves a layer's arguments to its device, where a model is spread over several."""
        if self.query.device == torch.device(device):
            return self

        def move(tensor: Any) -> Any:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return DensePlan(
            move(self.query),
            move(self.key),
            move(self.back),
            tuple(prefcore.RowInverse(*map(move, inverse)) for inverse in self.inverses),
            tuple(bucket._replace(context=move(bucket.context)) for bucket in self.buckets),
            {window: tuple(map(move, masks)) for window, masks in self.masks.items()},
        )


Plan = VarlenPlan | FlexPlan | DensePlan


def varlen_plan(layout: Layout, device: torch.device, windows: frozenset[int | None]) -> VarlenPlan:
    key_lengths = layout.context_lengths + layout.lengths
    cu_q, cu_k = offsets(layout.lengths), offsets(key_lengths)
    keys = inverse = None
    if layout.context_lengths.any():
        keys = _to_device(_keys(layout), device)
        inverse = prefcore.invert_rows(keys, layout.tokens)
    return VarlenPlan(
        _to_device(cu_q, device),
        _to_device(cu_k, device),
        int(layout.lengths.max()),
        int(key_lengths.max()),
        keys,
        *(inverse or (None, None)),
    )


def _keys(layout: Layout) -> np.ndarray:
    """The tokens that each segment attends to, context first, one segment after another."""
    starts = np.stack([layout.context_starts, layout.starts], axis=1).ravel()
    lengths = np.stack([layout.context_lengths, layout.lengths], axis=1).ravel()
    return ranges(starts, lengths)


def flex_plan(layout: Layout, device: torch.device, windows: frozenset[int | None]) -> FlexPlan:
    segment, position = layout.of_tokens()
    start = layout.context_starts[segment]
    arrays = (segment, start, start + layout.context_lengths[segment], position)
    tokens = [_to_device(array, device) for array in arrays]
    return FlexPlan({w: _block_mask(w, *tokens) for w in windows | {None}})


def _block_mask(window: int | None, segment: Tensor, start: Tensor, end: Tensor, position: Tensor) -> Any:
    """From the extremes of each block, not from N * N single entries; all tensors int32 ``[N]``."""
    from torch.nn.attention.flex_attention import BlockMask

    def attends(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (segment[q] == segment[k]) & (k <= q)
        allowed = own | ((k >= start[q]) & (k < end[q]))
        return allowed if window is None else allowed & (position[q] - position[k] < window)

    n = len(segment)
    first = torch.arange(0, n, _TILE, device=segment.device)
    last = (first + _TILE).clamp(max=n) - 1
    low = lambda x, fill: F.pad(x, (0, -n % _TILE), value=fill).view(-1, _TILE).amin(1)
    high = lambda x, fill: F.pad(x, (0, -n % _TILE), value=fill).view(-1, _TILE).amax(1)
    one = segment[first] == segment[last]  # blocks that lie within one segment
    # Some entry may count: segments go up along the row, so they meet where the keys' last is not below the
    # queries' first; and the contexts of several segments are taken together.
    partial = (first <= last[:, None]) & (segment[last] >= segment[first][:, None])
    begin, stop = low(torch.where(end > start, start, n), n), high(torch.where(end > start, end, 0), 0)
    partial |= (first < stop[:, None]) & (last >= begin[:, None])
    # Every entry counts: the keys are wholly before the queries in one segment, or wholly in its context.
    own = one & (segment[first] == segment[first][:, None]) & (last <= first[:, None])
    context = (first >= start[first][:, None]) & (last < end[first][:, None])
    whole = last - first + 1 == _TILE
    full = one[:, None] & (own | context) & whole & whole[:, None]
    if window is not None:
        closest = low(position, n)[:, None] - high(position, 0)
        farthest = high(position, 0)[:, None] - low(position, n)
        partial &= closest < window
        full &= farthest < window
    partial &= ~full
    return BlockMask.from_kv_blocks(
        *_blocks(partial), *_blocks(full), BLOCK_SIZE=_TILE, mask_mod=attends, seq_lengths=(n, n)
    )


def _blocks(grid: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of blocks the number of True ones, and all columns, those first; int32 [1, 1, ...]."""
    columns = grid.int().argsort(dim=1, descending=True, stable=True)
    return grid.sum(1, dtype=torch.int32)[None, None], columns.int()[None, None]


def dense_plan(layout: Layout, device: torch.device, windows: frozenset[int | None]) -> DensePlan:
    query, key, buckets = [], [], []
    back = np.empty(layout.tokens, dtype=np.int64)
    filled = 0
    for members in _alike(layout.context_lengths, layout.lengths):
        lengths, contexts = layout.lengths[members], layout.context_lengths[members]
        starts, context_starts = layout.starts[members], layout.context_starts[members]
        q, k = int(lengths.max()), int((contexts + lengths).max())
        place = np.arange(q)
        padded = np.where(place < lengths[:, None], starts[:, None] + place, -1)
        query.append(padded.ravel())
        here = np.flatnonzero(query[-1] >= 0)
        back[query[-1][here]] = filled + here
        filled += padded.size
        place = np.arange(k)
        own = np.where(place < (contexts + lengths)[:, None], (starts - contexts)[:, None] + place, -1)
        key.append(np.where(place < contexts[:, None], context_starts[:, None] + place, own).ravel())
        context = _to_device(contexts, device) if contexts.any() else None
        buckets.append(Bucket(len(members), q, k, context))
    index = [_to_device(np.concatenate(parts), device) for parts in (query, key)] + [_to_device(back, device)]
    inverses = [
        prefcore.invert_rows(i, rows) for i, rows in zip(index, (layout.tokens, layout.tokens, filled), strict=True)
    ]
    masks = {w: tuple(_dense_mask(bucket, w, device) for bucket in buckets) for w in windows | {None}}
    return DensePlan(index[0], index[1], index[2], tuple(inverses), tuple(buckets), masks)


def _alike(contexts: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Segments in buckets of alike lengths: padding costs work, and so does every bucket."""
    keys = contexts + lengths
    order = np.lexsort((lengths, keys, contexts > 0))
    buckets: list[list[int]] = []
    work = widest_q = widest_k = 0
    for segment in order.tolist():
        q, k = int(lengths[segment]), int(keys[segment])
        wide_q, wide_k = max(widest_q, q), max(widest_k, k)
        alike = buckets and (contexts[segment] > 0) == (contexts[buckets[-1][0]] > 0)
        if alike and (len(buckets[-1]) + 1) * wide_q * wide_k <= _SLACK * (work + q * k) + _CALL:
            buckets[-1].append(segment)
            work, widest_q, widest_k = work + q * k, wide_q, wide_k
        else:
            buckets.append([segment])
            work, widest_q, widest_k = q * k, q, k
    return [np.array(bucket) for bucket in buckets]


def _dense_mask(bucket: Bucket, window: int | None, device: torch.device) -> Tensor | None:
    """None where causality says it all; padded queries keep a key, so that no row of the softmax is empty."""
    if bucket.context is None and window is None:
        return None
    context = torch.zeros(1, dtype=torch.int32, device=device) if bucket.context is None else bucket.context
    # No query that counts lies beyond the keys; one of the padding would find nothing in its window there.
    q = (torch.arange(bucket.q, device=device)[:, None] + context[:, None, None]).clamp(max=bucket.k - 1)
    k = torch.arange(bucket.k, device=device)
    mask = k <= q
    if window is not None:
        mask &= q - k < window
    return mask[:, None]


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array.astype(np.int32)).to(device)


def _gather_keys(plan: VarlenPlan, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    if plan.keys is None:
        return key, value
    inverse = prefcore.RowInverse(plan.offsets, plan.places)  # type: ignore[arg-type]
    return (
        prefcore.gather_rows(key, plan.keys, inverse=inverse),
        prefcore.gather_rows(value, plan.keys, inverse=inverse),
    )


def _ragged(plan: VarlenPlan, query: Tensor, key: Tensor, value: Tensor) -> tuple[Any, ...]:
    """What both variable-length kernels take first: the values as wide as the keys, the keys of every segment."""
    key, value = _gather_keys(plan, key, _widen(value, query.shape[-1]))
    tensors = (x.contiguous() for x in (query, key, value))
    return (*tensors, plan.cu_q, plan.cu_k, plan.max_q, plan.max_k)


def flash(plan: VarlenPlan, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    out = flash_attn_varlen_func(
        *_ragged(plan, query, key, value),
        dropout_p=call.dropout,
        softmax_scale=call.scale,
        causal=True,  # aligned at the bottom right: the last query of a segment sees its last key
        window_size=(-1, -1) if call.window is None else (call.window - 1, 0),
        softcap=call.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out[..., : value.shape[-1]]


def varlen(plan: VarlenPlan, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": call.scale}
    query, keys, values, *layout = _ragged(plan, query, key, value)
    grouped = query.shape[1] // keys.shape[1]
    if grouped > 1:
        if _varlen_takes("enable_gqa"):
            options["enable_gqa"] = True
        else:
            keys, values = keys.repeat_interleave(grouped, 1), values.repeat_interleave(grouped, 1)
    out: Any = varlen_attn(
        query,
        keys,
        values,
        *layout,
        window_size=(-1 if call.window is None else call.window - 1, 0),
        **options,
    )
    return out[..., : value.shape[-1]]


@torch.compiler.assume_constant_result  # torch.compile would trace it, and warn of the cache
def _varlen_takes(name: str) -> bool:
    return name in _varlen_parameters()


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return frozenset()
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def flex(plan: FlexPlan, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    from torch.nn.attention.flex_attention import AuxRequest

    softcap: Any = call.softcap

    def cap(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return _capped(score, softcap)

    result = _flex_attention(query.device.type)(
        *(x.transpose(0, 1)[None] for x in (query, key, value)),
        score_mod=None if softcap is None else cap,
        block_mask=plan.blocks[call.window],
        scale=call.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=None if call.sinks is None else AuxRequest(lse=True),
    )
    if call.sinks is not None:
        # A sink is one more key without a value: it takes its share of each row.
        out, aux = result
        share = torch.sigmoid(aux.lse - call.sinks.float()[None, :, None])
        result = out * share[..., None].to(out.dtype)
    return result[0].transpose(0, 1)


def _flex_attention(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    if torch.compiler.is_compiling():
        return flex_attention
    return _compiled_flex_attention(device)


@functools.cache
def _compiled_flex_attention(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled, it would compute all N * N scores. Inductor's C++ for shapes that vary takes a size ks19 for its
    # variable ks1 and does not compile (torch 2.13), so on a CPU each layout is compiled anew.
    return torch.compile(flex_attention, dynamic=device != "cpu")


@torch.compiler.disable  # each layout has buckets of its own, and would be compiled anew
def dense(plan: DensePlan, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    to_query, to_key, to_back = plan.inverses
    query = prefcore.gather_rows(query, plan.query, inverse=to_query)
    key = prefcore.gather_rows(key, plan.key, inverse=to_key)
    value = prefcore.gather_rows(value, plan.key, inverse=to_key)
    masks = plan.masks.get(call.window)
    if masks is None:
        masks = tuple(_dense_mask(bucket, call.window, query.device) for bucket in plan.buckets)
    parts, row, column = [], 0, 0
    for bucket, mask in zip(plan.buckets, masks, strict=True):
        rows, columns = row + bucket.size * bucket.q, column + bucket.size * bucket.k
        q = query[row:rows].unflatten(0, (bucket.size, bucket.q)).transpose(1, 2)
        k, v = (x[column:columns].unflatten(0, (bucket.size, bucket.k)).transpose(1, 2) for x in (key, value))
        if call.softcap is None and call.sinks is None:
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=call.dropout,
                is_causal=mask is None,
                scale=call.scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        else:
            out = _explicit(q, k, v, mask, call)
        parts.append(out.transpose(1, 2).flatten(0, 1))
        row, column = rows, columns
    return prefcore.gather_rows(torch.cat(parts), plan.back, inverse=to_back)


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: Call) -> Tensor:
    """Attention with softcap and sinks, which torch's function lacks."""
    grouped = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(grouped, 1), v.repeat_interleave(grouped, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if call.scale is None else call.scale)
    if call.softcap is not None:
        scores = _capped(scores, call.softcap)
    if mask is None:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, -torch.inf)
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if call.sinks is not None:
        sinks = call.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = F.dropout(scores.softmax(-1)[..., : k.shape[-2]], call.dropout)
    return weights.to(v.dtype) @ v


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap)


def _widen(value: Tensor, size: int) -> Tensor:
    return F.pad(value, (0, size - value.shape[-1])) if value.shape[-1] < size else value


def _lacks_flash(needs: Needs, device: torch.device, dtype: torch.dtype, grad: bool) -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    return _lacks_sixteen_bits(device, dtype, needs) or ("it has no sinks" if needs.sinks else None)


def _lacks_varlen(needs: Needs, device: torch.device, dtype: torch.dtype, grad: bool) -> str | None:
    if not _varlen_takes("window_size"):
        return f"torch {torch.__version__} has no varlen_attn with windows"
    lacking = {"softcap": needs.softcap, "sinks": needs.sinks, "dropout": needs.dropout}
    missing = [name for name, wanted in lacking.items() if wanted]
    return _lacks_sixteen_bits(device, dtype, needs) or (f"it has no {', '.join(missing)}" if missing else None)


def _lacks_sixteen_bits(device: torch.device, dtype: torch.dtype, needs: Needs) -> str | None:
    if device.type != "cuda":
        return f"it runs on GPUs only, not on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16 only, not {dtype}"
    if needs.head_size > 256 or needs.head_size % 8 or needs.value_size > needs.head_size:
        return f"it takes heads of up to 256 values, a multiple of 8, not {needs.head_size} and {needs.value_size}"
    if torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0"
    return None


def _lacks_flex(needs: Needs, device: torch.device, dtype: torch.dtype, grad: bool) -> str | None:
    if needs.dropout:
        return "it has no dropout"
    if dtype == torch.float64:
        return "it takes no float64"
    if device.type != "cuda":
        if grad:
            return "it has no backward on a CPU"
        if needs.sinks:
            return "it has no sinks on a CPU"
    return None


def _lacks_dense(needs: Needs, device: torch.device, dtype: torch.dtype, grad: bool) -> str | None:
    return None


class Backend(NamedTuple):
    plan: Callable[[Layout, torch.device, frozenset[int | None]], Plan]
    call: Callable[..., Tensor]
    lacks: Callable[[Needs, torch.device, torch.dtype, bool], str | None]


# Best first.
BACKENDS: dict[str, Backend] = {
    "flash": Backend(varlen_plan, flash, _lacks_flash),
    "varlen": Backend(varlen_plan, varlen, _lacks_varlen),
    "flex": Backend(flex_plan, flex, _lacks_flex),
    "sdpa": Backend(dense_plan, dense, _lacks_dense),
}


def choose(name: str, needs: Needs, device: torch.device, dtype: torch.dtype, grad: bool) -> str:
    """The backend called ``name``, or for ``"auto"`` the first that can do what the model asks for.

    Raises:
        ValueError: no such backend.
        NotImplementedError: the named backend cannot do it; the text says why.
    """
    if name == "auto":
        if device.type != "cuda":
            return "sdpa"  # on a CPU FlexAttention compiles for long, and has no backward
        return next(key for key, backend in BACKENDS.items() if backend.lacks(needs, device, dtype, grad) is None)
    if name not in BACKENDS:
        raise ValueError(f"attention must be one of {('auto', *BACKENDS)}, got {name!r}")
    lack = BACKENDS[name].lacks(needs, device, dtype, grad)
    if lack is not None:
        raise NotImplementedError(f"the attention backend {name!r} cannot be used here: {lack}")
    return name

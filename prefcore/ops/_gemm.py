"""Matrix products into a given output, which may be wider than the operands: sums are then never rounded to them."""

from __future__ import annotations

import torch
from torch import Tensor


def mm(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out = a @ b``; a 16-bit product may go to a float32 ``out`` unrounded."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif out.is_cuda and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        wide = torch.promote_types(a.dtype, out.dtype)
        out.copy_(torch.mm(a.to(wide), b.to(wide)))


def addmm(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a @ b``; a 16-bit product may go to a float32 ``out`` unrounded."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif out.is_cuda and out.dtype == torch.float32:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        wide = torch.promote_types(a.dtype, out.dtype)
        product = torch.mm(a.to(wide), b.to(wide))
        out.copy_(product.add_(out))

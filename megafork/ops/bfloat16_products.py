"""bfloat16 matrix products on processors that have none: computed in float32, and then rounded.

Without AVX-512, torch multiplies bfloat16 matrices element by element: 0.7 to 9 GFLOP/s of one core
of an AMD EPYC, where float32 has 40 to 55. Both add up in float32 and round once, so that only the
order of the sums differs. Imports torch alone: rollout servers use it too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.library import Library

_aten = torch.ops.aten


def are_slow() -> bool:
    """Return whether oneDNN is absent, or lacks bfloat16 products for this processor."""
    mkldnn = torch.backends.mkldnn
    return not (mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@lru_cache(maxsize=1)
def replace_where_slow(few_rows: int = 0) -> Library | None:
    """Replace all bfloat16 products on the CPU, for this process, where `are_slow()`.

    Returns the Library that holds the replacements, which end with it, or None.
    few_rows: products of at most this many rows are left to torch, which is quicker for them, as it
    does not widen all weights first. It is 0 in a trainer, where a row's bits may not depend on the
    number of rows beside it.
    """
    if not are_slow():
        return None
    library = Library("aten", "IMPL")
    products: dict[str, Callable[..., Tensor]] = {
        "mm": _mm,
        "bmm": _bmm,
        "addmm": _addmm,
        "baddbmm": _baddbmm,
    }
    with warnings.catch_warnings():  # torch says of the first one that it is replaced
        warnings.simplefilter("ignore")
        for name, product in products.items():
            library.impl(name, partial(product, few_rows), "CPU", allow_override=True)
    return library


def _widens(few_rows: int, a: Tensor) -> bool:
    return a.dtype == torch.bfloat16 and a.shape[-2] > few_rows


def _mm(few_rows: int, a_MK: Tensor, b_KN: Tensor) -> Tensor:
    if _widens(few_rows, a_MK):
        return _mm(0, a_MK.float(), b_KN.float()).bfloat16()
    return _aten.mm.out(a_MK, b_KN, out=a_MK.new_empty(a_MK.shape[0], b_KN.shape[1]))


def _bmm(few_rows: int, a_BMK: Tensor, b_BKN: Tensor) -> Tensor:
    if _widens(few_rows, a_BMK):
        return _bmm(0, a_BMK.float(), b_BKN.float()).bfloat16()
    out_BMN = a_BMK.new_empty(*a_BMK.shape[:2], b_BKN.shape[2])
    return _aten.bmm.out(a_BMK, b_BKN, out=out_BMN)


def _addmm(
    few_rows: int, c_MN: Tensor, a_MK: Tensor, b_KN: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    if _widens(few_rows, a_MK):
        floats = (c_MN.float(), a_MK.float(), b_KN.float())
        return _addmm(0, *floats, beta=beta, alpha=alpha).bfloat16()
    out_MN = a_MK.new_empty(a_MK.shape[0], b_KN.shape[1])
    return _aten.addmm.out(c_MN, a_MK, b_KN, beta=beta, alpha=alpha, out=out_MN)


def _baddbmm(
    few_rows: int, c_BMN: Tensor, a_BMK: Tensor, b_BKN: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    if _widens(few_rows, a_BMK):
        floats = (c_BMN.float(), a_BMK.float(), b_BKN.float())
        return _baddbmm(0, *floats, beta=beta, alpha=alpha).bfloat16()
    out_BMN = a_BMK.new_empty(*a_BMK.shape[:2], b_BKN.shape[2])
    return _aten.baddbmm.out(c_BMN, a_BMK, b_BKN, beta=beta, alpha=alpha, out=out_BMN)

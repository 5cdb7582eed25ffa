# SPDX-License-Identifier: Apache-2.0
"""Rows made from a known dictionary, to see whether training finds it again."""

from __future__ import annotations

import torch
from torch import Tensor


def known_dictionary(
    n: int, d: int = 32, m: int = 64, k: int = 3, *, offset: float = 0.0, seed: int = 42
) -> tuple[Tensor, Tensor]:
    """Rows that are sums of exactly `k` of `m` random unit directions, coefficients uniform in [0.5, 1.5]; no noise.

    Args:
        n: rows.
        offset: length of a constant vector in a random direction that is added to all rows, in units of
            ``sqrt(E ||x - E x||²)``: the ratio of mean to spread that decides how many latents start dead
            (arXiv:2605.31518). 0: none.
        seed: of directions and rows; the directions do not depend on `n`, and neither do the first rows.

    Returns:
        ``(rows [n, d], directions [m, d])``, float32 on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(m, d, generator=generator), dim=1)
    shift = torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=0)
    # Of one coefficient, chosen or 0: E c² = (k/m) (1 + 1/12), E c = k/m; two of a row cannot be the same.
    share, both = k / m, k * (k - 1) / (m * max(m - 1, 1))
    gram = directions @ directions.T
    spread = share * 13 / 12 * m + both * (gram.sum() - m) - share**2 * gram.sum()
    shift *= offset * float(spread) ** 0.5
    parts = []
    for start in range(0, n, 8192):
        part = torch.Generator().manual_seed(seed * 1_000_003 + start)
        chosen = torch.rand(8192, m, generator=part).topk(k, dim=1).indices
        codes = torch.zeros(8192, m).scatter_(1, chosen, 0.5 + torch.rand(8192, k, generator=part))
        parts.append((codes @ directions).add_(shift))
    return torch.cat(parts)[:n], directions

# SPDX-License-Identifier: Apache-2.0
"""Tokens as HTML: escaped, whitespace visible, coloured by activation."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from markupsafe import Markup, escape

from .report_numbers import sig

_SPECIAL = re.compile(r"[\x00-\x1f\x7f]| {2,}")


def visible(text: str) -> Markup:
    """Escaped text in which newlines, tabs, runs of spaces and control characters can be seen.

    The marks are drawn by the style sheet, so searching and copying meet the token's own text.
    """
    parts, at = [], 0
    for match in _SPECIAL.finditer(text):
        parts.append(escape(text[at : match.start()]))
        found, at = match.group(), match.end()
        if found == "\n":
            parts.append(Markup('<s class="nl">\n</s>'))
        elif found == "\t":
            parts.append(Markup('<s class="tab">\t</s>'))
        elif found[0] == " ":
            parts.append(Markup('<s class="sp">{}</s>').format(found))
        else:  # the Unicode picture of the control character: HTML cannot carry the character itself
            parts.append(
                Markup('<s class="ctl">{}</s>').format("\u2421" if found == "\x7f" else chr(0x2400 + ord(found)))
            )
    parts.append(escape(text[at:]))
    return Markup("").join(parts)


def passage(tokens: Sequence[str], values: Sequence[float], peak: int, top: float) -> Markup:
    """One passage: a span a token, opacity |value| / `top` (the latent's maximum), the value on hover."""
    spans = []
    for i, (token, value) in enumerate(zip(tokens, values, strict=True)):
        share = min(1.0, abs(value) / top) if top > 0 and math.isfinite(value) else 0.0
        kind = "t" + (" on" if value else "") + (" neg" if value < 0 else "") + (" peak" if i == peak else "")
        shade = Markup(' style="--a:{:.3g}"').format(share) if share else ""
        title = f"{sig(value)} ({100 * share:.0f} % of this latent's maximum)" if value else "0"
        spans.append(Markup('<span class="{}"{} title="{}">{}</span>').format(kind, shade, title, visible(token)))
        following = tokens[i + 1] if i + 1 < len(tokens) else "\n"
        if token.endswith("\n") and not following.startswith("\n"):
            spans.append(Markup("<br>"))
    return Markup("").join(spans)


def chips(tokens: Sequence[str]) -> list[Markup]:
    """Tokens of a list, a leading space shown as a mark because ' the' and 'the' are different tokens."""
    return [
        Markup('<s class="one"> </s>') + visible(t[1:]) if t[:1] == " " and t[1:2] != " " else visible(t)
        for t in tokens
    ]

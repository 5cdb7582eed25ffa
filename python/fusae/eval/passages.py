# SPDX-License-Identifier: Apache-2.0
"""The passages on which chosen latents are most active, as text with a value for each token."""

from __future__ import annotations

import codecs
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..data import TokenChunks
from ..data.progress import token_progress
from .latents import ActivationHistograms

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..data import Activations
    from .metrics import Codes


def choose_latents(
    density: Sequence[float] | Tensor, count: int = 12, *, seed: int = 0, min_density: float = 0.0
) -> list[int]:
    """`count` latents (fewer if fewer are active) spread over the density quantiles of those that fire, rarest first.

    Latents with density above `min_density` are ranked by density. One is drawn from each of `count` strata of that
    ranking which are narrow around the median and wide at the ends: the middle is where latents tend to be
    interpretable, the ends show the rare and the nearly always active. The same `density`, `count` and `seed` give the
    same latents.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    values = np.asarray(density, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"density must have shape [m], got {list(values.shape)}")
    active = np.flatnonzero(values > max(min_density, 0.0))
    ranked = active[np.argsort(values[active], kind="stable")]
    count = min(count, len(ranked))
    if count == 0:
        return []
    uniform = (np.arange(count) + np.random.default_rng(seed).random(count)) / count
    quantile = 0.5 + 4.0 * (uniform - 0.5) ** 3  # maps 0..1 onto itself, flat around the middle
    ranks = np.minimum((quantile * len(ranked)).astype(np.int64), len(ranked) - 1)
    # Ranks that fell together move up to the next free one, and down from the end where there is none.
    for i in range(1, count):
        ranks[i] = max(ranks[i], ranks[i - 1] + 1)
    for i in range(count - 1, -1, -1):
        ranks[i] = min(ranks[i], len(ranked) - count + i)
    return [int(latent) for latent in ranked[ranks]]


def top_passages(
    activations: Activations,
    chunks: TokenChunks | np.ndarray,
    encode: Callable[[Tensor], Codes],
    latents: Sequence[int],
    tokenizer: Tokenizer,
    *,
    passages: int = 8,
    before: int = 24,
    after: int = 8,
    effects: Sequence[dict[str, list[str]]] | None = None,
    batch_chunks: int = 32,
    max_rows: int | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> list[dict[str, Any]]:
    """The tokens on which each latent is most active, with their context, as ``features.json`` holds them.

    One pass over the rows. A chunk gives a latent at most one passage, around its highest value there, so that one text
    does not fill the list.

    Args:
        activations: rows to look at (`fusae.data.collect`), of `chunks`; or anything with ``blocks(batch_chunks)``, an
            iterator of (rows ``[r, d]``, their (chunk, position) ``[r, 2]``), each of some whole chunks.
        chunks: `TokenChunks` or token ids ``[chunks, ctx]`` that `activations` was collected from.
        encode: maps rows ``[n, d]`` (fp32) to codes (`values`, `indices`, and `offsets` if ragged).
        latents: which ones.
        passages: how many to keep for each.
        before, after: tokens of context on the two sides of the peak (less at the ends of a chunk).
        effects: what `fusae.eval.logit_effects` gave for these latents, to be put in.
        batch_chunks: chunks encoded at once.
        max_rows: look no further once so many rows have been seen; None: at all.

    Returns:
        One dict a latent, in the order of `latents`: ``latent``; ``density``, share of the rows on which it is active;
        ``max_value`` (by magnitude, for latents of either sign); ``histogram`` of its activations
        (`ActivationHistograms`); ``passages``, strongest first, each
        ``{"tokens": [str], "values": [float], "peak": int}`` (values of positions that are not among the rows are 0; a
        token that ends inside a character is "" and the token that completes it shows the character); with `effects`
        also ``promoted`` and ``suppressed``.
    """
    latents = [int(latent) for latent in latents]
    if len(set(latents)) != len(latents) or any(latent < 0 for latent in latents):
        raise ValueError(f"latents must be distinct and not negative, got {latents}")
    if effects is not None and len(effects) != len(latents):
        raise ValueError(f"effects must have one entry for each of the {len(latents)} latents, got {len(effects)}")
    if min(passages, batch_chunks) < 1 or min(before, after) < 0:
        raise ValueError("passages and batch_chunks must be at least 1, before and after at least 0")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1 or None, got {max_rows}")
    chunks = TokenChunks.of(chunks)
    blocks = getattr(activations, "blocks", None)
    if blocks is None:
        expected = (activations.meta["inputs"]["chunks"], activations.meta["inputs"]["ctx"])
        if chunks.shape != expected:
            raise ValueError(f"chunks must be those of the activations, {list(expected)}, got {list(chunks.shape)}")
        blocks = functools.partial(_blocks, activations)

    best: list[list[tuple[float, int, np.ndarray]]] = [[] for _ in latents]
    fired, seen = np.zeros(len(latents), dtype=np.int64), 0
    histograms = ActivationHistograms(len(latents))
    total = len(activations) if max_rows is None else min(max_rows, len(activations))
    with token_progress(progress) as bar, torch.inference_mode():
        task = bar.add_task("passages", total=total)
        for rows, where in blocks(batch_chunks):
            values = _columns(encode(rows.to(device)), len(rows), latents)
            fired += (values != 0).sum(0)
            histograms.update(values)
            ids, row_of = np.unique(where[:, 0], return_inverse=True)
            grid = np.zeros((len(ids), chunks.shape[1], len(latents)), dtype=np.float32)
            grid[row_of, where[:, 1]] = values
            for column, kept in enumerate(best):
                peaks = np.abs(grid[:, :, column]).max(1)
                for place in np.argsort(-peaks, kind="stable")[:passages]:
                    if peaks[place] > 0:
                        kept.append((float(peaks[place]), int(ids[place]), grid[place, :, column].copy()))
                kept.sort(key=lambda item: (-item[0], item[1]))
                del kept[passages:]
            seen += len(rows)
            bar.update(task, completed=min(seen, total))
            if seen >= total:
                break

    features = []
    for column, (latent, kept) in enumerate(zip(latents, best, strict=True)):
        feature: dict[str, Any] = {
            "latent": latent,
            "density": float(fired[column] / max(seen, 1)),
            "max_value": kept[0][0] if kept else 0.0,
        }
        if effects is not None:
            names = ("promoted", "suppressed", "promoted_values", "suppressed_values")
            feature |= {name: list(effects[column][name]) for name in names if name in effects[column]}
        feature["passages"] = [_passage(tokenizer, chunks.row(chunk), row, before, after) for _, chunk, row in kept]
        features.append(feature)
    for feature, histogram in zip(features, histograms.result(), strict=True):
        feature["histogram"] = histogram
    return features


def _blocks(activations: Activations, batch_chunks: int) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Rows of `batch_chunks` whole chunks at a time, in the order they are stored. A chunk's rows lie together."""
    start, width = 0, batch_chunks * activations.meta["inputs"]["ctx"]
    while start < len(activations):
        # One row more than such a block can have shows where its last chunk ends.
        where = np.asarray(activations.positions[start : start + width + 1])
        ends = np.append(np.flatnonzero(np.diff(where[:, 0])) + 1, len(where))
        if len(ends) > 1 and len(where) > width:
            ends = ends[:-1]  # this chunk may go on
        stop = int(ends[min(batch_chunks, len(ends)) - 1])
        yield activations.take(slice(start, start + stop)), where[:stop]
        start += stop


def write_features(path: str | Path, features: Iterable[dict[str, Any]]) -> None:
    """Write features as JSON, in one step: a reader sees the old file or the new one, never a part."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(list(features), ensure_ascii=False, indent=1), encoding="utf-8")
    os.replace(partial, path)


def _passage(tokenizer: Tokenizer, ids: np.ndarray, values: np.ndarray, before: int, after: int) -> dict[str, Any]:
    peak = int(values.argmax())
    start, stop = max(0, peak - before), min(len(ids), peak + after + 1)
    tokens = token_strings(tokenizer, ids.tolist())[start:stop]  # the whole chunk: characters may span tokens
    return {"tokens": tokens, "values": [float(v) for v in values[start:stop]], "peak": peak - start}


def _columns(codes: Codes, rows: int, latents: Sequence[int]) -> np.ndarray:
    """Dense values ``[rows, len(latents)]`` fp32 of the chosen latents."""
    values, indices = codes.values.detach().float().cpu().numpy(), codes.indices.cpu().numpy()
    offsets = getattr(codes, "offsets", None)
    if offsets is not None:
        offsets = offsets.cpu().numpy()
        row = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        values, indices = values[: offsets[-1]], indices[: offsets[-1]]
        count = len(offsets) - 1
    else:
        count = len(values)
        row = np.repeat(np.arange(count), values.shape[1])
        values, indices = values.reshape(-1), indices.reshape(-1)
    if count != rows:
        raise ValueError(f"encode must return codes of {rows} rows, got {count}")
    column = np.full(max([*latents, int(indices.max(initial=0))]) + 1, -1)
    column[list(latents)] = np.arange(len(latents))
    chosen = (column[indices] >= 0) & (values != 0)
    dense = np.zeros((rows, len(latents)), dtype=np.float32)
    dense[row[chosen], column[indices[chosen]]] = values[chosen]
    return dense


# --- token strings ---------------------------------------------------------------------------------------------------


def token_strings(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """The text of each token as it reads in the passage; joined they are the passage.

    Spaces are spaces (not "Ġ" or "▁"). Where a character's bytes are spread over several tokens, it stands at the last
    of them and the others are "".
    """
    ids = [int(i) for i in ids]
    if not _is_byte_level(tokenizer):
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        return [stream.step(tokenizer, i) or "" for i in ids]
    added = tokenizer.get_added_tokens_decoder()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    strings = []
    for i in ids:
        if i in added:
            strings.append(decoder.decode(b"", final=True) + added[i].content)
            decoder.reset()
        else:
            strings.append(decoder.decode(_token_bytes(tokenizer, i)))
    if strings:
        strings[-1] += decoder.decode(b"", final=True)
    return strings


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of one token of the vocabulary; bytes that are no whole character are shown as "�"."""
    return token_strings(tokenizer, [token])[0] if _is_byte_level(tokenizer) else tokenizer.decode([token], False)


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    from tokenizers import decoders

    return isinstance(tokenizer.decoder, decoders.ByteLevel)


def _token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    text = tokenizer.id_to_token(token)
    if text is None:
        raise ValueError(f"token id {token} is not in the vocabulary of {tokenizer.get_vocab_size()} tokens")
    return bytes(_byte_of_character()[character] for character in text)


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes a byte as a printable character: itself where it is one, else the next from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}

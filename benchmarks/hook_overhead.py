# SPDX-License-Identifier: Apache-2.0
"""What an attached dictionary costs a model's forward pass: `fusae.hook` beside SAELens' `HookedSAETransformer` way.

The demo model (SmolLM2-135M) runs the same tokens plain and with a random dictionary at the output of one block, in
turns: attached by `fusae.hook`, and by a forward hook that calls the wrapper with which SAELens' `HookedSAETransformer`
attaches an SAE. Mode "error" keeps the error term (SAELens: ``use_error_term=True``, which encodes and decodes twice),
mode "replace" does not. Overhead is the time above that of the plain pass of the same round; the bar is a ratio of 0.6.

    python benchmarks/hook_overhead.py [--m 32768] [--k 32] [--rows 512] [--rounds 15] [--only-fusae] [--out FILE.json]

SAELens (6.54) and gguf must be importable next to fusae; ``--only-fusae`` leaves it out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from pathlib import Path

import torch

import fusae
from fusae.data import find_demo, load_model
from fusae.nn import SparseCoder, SparseCoderConfig


def coder_of(kind: str, d: int, m: int, k: int, x: torch.Tensor) -> SparseCoder:
    """A random dictionary; a JumpReLU's threshold leaves k latents active in an average row of `x` ``[n, d]``."""
    fields = {"select": "threshold"} if kind == "jumprelu" else {}
    coder = SparseCoder(SparseCoderConfig(d=d, m=m, k=k, pre_bias=False, **fields)).eval().requires_grad_(False)
    if kind == "jumprelu":
        pre = torch.nn.functional.linear(x[:64], coder.W_enc, coder.b_enc)
        coder.threshold.fill_(max(float(pre.flatten().topk(64 * k).values[-1]), 0.0))
    return coder


def saelens_of(coder: SparseCoder, kind: str):
    """The same dictionary as an SAE of SAELens."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig

    config = coder.config
    common = {"d_in": config.d, "d_sae": config.m, "apply_b_dec_to_input": False}
    if kind == "jumprelu":
        sae = JumpReLUSAE(JumpReLUSAEConfig(**common))
    else:
        sae = TopKSAE(TopKSAEConfig(**common, k=config.k))
    with torch.no_grad():
        sae.W_enc.copy_(coder.W_enc.T)
        sae.W_dec.copy_(coder.W_dec)
        sae.b_enc.copy_(coder.b_enc)
        sae.b_dec.copy_(coder.b_dec)
        if kind == "jumprelu":
            sae.threshold.copy_(coder.threshold)
    return sae.eval().requires_grad_(False)


class SAELensHook:
    """`sae_lens.analysis.hooked_sae_transformer._SAEWrapper`, as a hook of a Hugging Face block."""

    def __init__(self, module: torch.nn.Module, sae: torch.nn.Module, error_term: bool) -> None:
        from sae_lens.analysis.hooked_sae_transformer import _SAEWrapper

        self.module, self.wrapper = module, _SAEWrapper(sae, use_error_term=error_term)

    def __enter__(self) -> SAELensHook:
        def hook(_module, _args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            new = self.wrapper(hidden)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        self.handle = self.module.register_forward_hook(hook)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def timed(run) -> float:
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def measure(model, ids, name: str, kind: str, mode: str, m: int, k: int, rounds: int, only_fusae: bool) -> dict:
    module = model.get_submodule(name)
    with torch.inference_mode():
        with fusae.hook(model, name, SparseCoder(SparseCoderConfig(d=model.config.hidden_size, m=8, k=1))) as h:
            plain = model(ids).logits
        x = h.input.flatten(0, 1)
        coder = coder_of(kind, x.shape[1], m, k, x)

        def with_fusae() -> torch.Tensor:
            with fusae.hook(model, name, coder, mode) as h:
                out = model(ids).logits
            assert h.codes.m == m
            return out

        contenders = {"plain": lambda: model(ids).logits, "fusae": with_fusae}
        if not only_fusae:
            hook = SAELensHook(module, saelens_of(coder, kind), mode == "error")

            def with_saelens() -> torch.Tensor:
                with hook:
                    return model(ids).logits

            contenders["sae-lens"] = with_saelens
        gemm = torch.empty(x.shape[0], m)
        contenders["gemm"] = lambda: torch.mm(x, coder.W_enc.T, out=gemm)
        ours = with_fusae()
        assert mode == "replace" or torch.equal(ours, plain), (
            "with the error term and no edit the logits are the model's"
        )
        if not only_fusae:
            torch.testing.assert_close(contenders["sae-lens"](), ours, atol=1e-2, rtol=1e-3)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for contender, run in contenders.items():
                times[contender].append(timed(run))

    def overhead(contender: str) -> list[float]:
        return [t - p for t, p in zip(times[contender], times["plain"], strict=True)]

    row = {"kind": kind, "mode": mode, "n": x.shape[0], "d": x.shape[1], "m": m, "k": k}
    with torch.inference_mode(), fusae.hook(model, name, coder, "read") as h:
        model(ids)
    row["l0"] = float(h.codes.l0.float().mean())
    row |= {f"{name}_ms": statistics.median(ts) for name, ts in times.items()}
    row["fusae_overhead_ms"] = statistics.median(overhead("fusae"))
    if not only_fusae:
        ratios = [a / b for a, b in zip(overhead("fusae"), overhead("sae-lens"), strict=True)]
        row["sae-lens_overhead_ms"] = statistics.median(overhead("sae-lens"))
        row["ratio"] = statistics.median(ratios)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--m", type=int, default=32768)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rows", type=int, default=512, help="tokens, in sequences of 128")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--module", default="model.layers.11")
    parser.add_argument("--only-fusae", action="store_true", help="without SAELens")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    files = find_demo()
    if files is None:
        raise SystemExit("the demo's files are not there: `fusae demo` fetches them")
    model = load_model(files.model).model
    ctx = min(options.rows, 128)
    ids = torch.randint(5, model.config.vocab_size, (max(options.rows // ctx, 1), ctx))
    rows = []
    for kind, mode in itertools.product(("topk", "jumprelu"), ("error", "replace")):
        sizes = options.m, options.k, options.rounds
        rows.append(measure(model, ids, options.module, kind, mode, *sizes, options.only_fusae))
        print(json.dumps(rows[-1]))
    if options.out:
        about = {"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.processor()}
        options.out.write_text(json.dumps({**about, "rounds": options.rounds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

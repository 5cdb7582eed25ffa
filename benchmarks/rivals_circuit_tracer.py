# SPDX-License-Identifier: Apache-2.0
"""circuit-tracer with fusae and without, in turns: time and peak memory. Needs circuit-tracer (docs/integrations.md).

    python benchmarks/rivals_circuit_tracer.py --n 64 256 --dtype float32 bfloat16 --threads 1

JumpReLU transcoders of random weights, thresholds such that about 60 latents are active at a position, as in Gemma
Scope. Both contenders hold the same parameters.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch

import fusae
from fusae.testing.bench import interleaved, peak_memory, percentiles, ratio

OPS = {
    "encode": "one layer, dense activations",
    "encode_sparse": "one layer, active latents and their encoder rows",
    "components": "compute_attribution_components of the transcoder set",
    "clt components": "compute_attribution_components of a cross-layer transcoder",
    "scores": "one layer's attribution scores of a batch of 64 gradients",
}
THRESHOLD = 2.9  # of pre-activations of variance 1: 0.19 % are above


def _weights(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.nn.Parameter:
    return torch.nn.Parameter((torch.randn(shape) * scale).to(dtype), requires_grad=False)


def _transcoders(d: int, m: int, layers: int, dtype: torch.dtype) -> Any:
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet

    made = {}
    for layer in range(layers):
        with torch.device("meta"):
            made[layer] = SingleLayerTranscoder(d, m, JumpReLU(torch.zeros(m), 0.1), layer, dtype=dtype)
        made[layer].W_enc = _weights(m, d, dtype=dtype, scale=d**-0.5)
        made[layer].W_dec = _weights(m, d, dtype=dtype, scale=d**-0.5)
        made[layer].b_enc, made[layer].b_dec = _weights(m, dtype=dtype, scale=0), _weights(d, dtype=dtype)
        made[layer].activation_function.threshold = torch.nn.Parameter(torch.full((m,), THRESHOLD, dtype=dtype))
    return TranscoderSet(made, "hook_resid_mid", "hook_mlp_out").requires_grad_(False)


def _cross_layer(d: int, m: int, layers: int, dtype: torch.dtype) -> Any:
    from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder

    clt = CrossLayerTranscoder(layers, m, d, "jump_relu", lazy_decoder=False, dtype=dtype).requires_grad_(False)
    for p in clt.parameters():
        p.copy_(torch.randn(p.shape) * d**-0.5)
    clt.b_enc.zero_()
    clt.activation_function.threshold.fill_(THRESHOLD)
    return clt


def _twin(model: Any) -> Any:
    """Another object with the same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _score_calls(coders: Any, x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    from circuit_tracer.attribution.context_nnsight import AttributionContext

    parts = coders.compute_attribution_components(x)
    parts["decoder_vecs"] = parts["decoder_vecs"].clone()
    grads = torch.randn(64, x.shape[1], x.shape[2]).to(x.dtype)
    calls = {}
    for name in ("circuit-tracer", "circuit-tracer + fusae"):
        context = AttributionContext(
            parts["activation_matrix"], parts["reconstruction"], x[0], parts["decoder_vecs"], parts["encoder_vecs"],
            parts["encoder_to_decoder_map"], parts["decoder_locations"], x[0],
        )  # fmt: skip
        context._batch_buffer = torch.zeros(context._row_size, 64, dtype=x.dtype)
        if name.endswith("fusae"):
            fusae.accelerate(context)
        calls[name] = functools.partial(context.compute_feature_attributions, 0, grads)
    return calls


@torch.no_grad()
def calls(op: str, n: int, d: int, m: int, layers: int, dtype: str) -> dict[str, Callable[[], Any]]:
    """The two contenders of one op."""
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    x = torch.randn(layers, n, d).to(kind)
    tool = (_cross_layer if op.startswith("clt") else _transcoders)(d, m, layers, kind)
    if op == "scores":
        made = _score_calls(tool, x)
    else:
        method = op.removeprefix("clt ").replace("components", "compute_attribution_components")
        made = {}
        for name, model in (("circuit-tracer", tool), ("circuit-tracer + fusae", fusae.accelerate(_twin(tool)))):
            target, given = (model[0], x[0]) if method.startswith("encode") else (model, x)
            made[name] = functools.partial(getattr(target, method), given)

    return {name: torch.no_grad()(call) for name, call in made.items()}


def contender(name: str, **arguments: Any) -> Callable[[], Any]:
    """One of `calls`: a factory for `fusae.testing.bench.peak_memory`."""
    return calls(**arguments)[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--n", type=int, nargs="+", default=[64, 256], help="positions")
    parser.add_argument("--d", type=int, default=768)
    parser.add_argument("--m", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-memory", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"d {options.d}, m {options.m}, {options.layers} layers, {torch.get_num_threads()} threads, JumpReLU")
    print(
        f"{'op':15} {'dtype':9} {'n':>4} {'tool ms':>9} {'+ fusae ms':>10} {'speed':>6} {'peak MiB':>9} {'+ fusae':>9}"
    )
    for op in options.op:
        for dtype in options.dtype:
            for n in options.n:
                shape = {"op": op, "n": n, "d": options.d, "m": options.m, "layers": options.layers, "dtype": dtype}
                times = interleaved(calls(**shape), options.rounds)
                tool, ours = times
                peaks = [
                    None if options.no_memory else
                    peak_memory(f"{__name__ if __name__ != '__main__' else 'rivals_circuit_tracer'}:contender",
                                {**shape, "name": name}, warm={"m": 64, "n": 4})
                    for name in times
                ]  # fmt: skip
                shown = ["-" if p is None else f"{p / 2**20:.0f}" for p in peaks]
                print(
                    f"{op:15} {dtype:9} {n:4} {percentiles(times[tool]).p50 * 1e3:9.1f} "
                    f"{percentiles(times[ours]).p50 * 1e3:10.1f} {ratio(times, tool, ours):5.2f}x "
                    f"{shown[0]:>9} {shown[1]:>9}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

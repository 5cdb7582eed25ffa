# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show of the Triton kernels: graphs, streams, tensors of more than 2³¹ elements."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

import fusae
from fusae.testing import assert_equal

N, D, M, K = 256, 128, 16_384, 16


def inputs(dtype=torch.bfloat16):
    gen = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(N, D, generator=gen, device="cuda").to(dtype)
    W = (torch.randn(M, D, generator=gen, device="cuda") / D**0.5).to(dtype)
    return x, W, torch.zeros(M, device="cuda", dtype=dtype)


def ops(x, W, b):
    codes = fusae.encode_topk(x, W, b, K, backend="triton")
    ragged = fusae.encode_threshold(x, W, b, 2.0, capacity=N * 2048, backend="triton")
    batch, smallest = fusae.encode_batch_topk(x, W, b, K, backend="triton")
    return [codes.values, codes.indices, ragged.values, ragged.indices, ragged.offsets, batch.values, batch.indices,
            batch.offsets, smallest]  # fmt: skip


def test_a_graph_replays_what_a_call_gives():
    x, W, b = inputs()
    ops(x, W, b)  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops(x, W, b)
    x.copy_(x.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    for got, wanted in zip(captured, ops(x, W, b), strict=True):
        assert torch.equal(got, wanted)


def test_streams_and_runs_agree_bit_by_bit():
    x, W, b = inputs()
    wanted = ops(x, W, b)
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            results.append(ops(x, W, b))
    torch.cuda.synchronize()
    for result in results:
        for got, first in zip(result, wanted, strict=True):
            assert torch.equal(got, first)


def test_a_call_with_a_capacity_never_waits_for_the_device():
    x, W, b = inputs()
    ops(x, W, b)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops(x, W, b)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_weights_of_more_than_2_31_elements():
    m, d = 2**20 + 3, 2056
    if torch.cuda.mem_get_info()[0] < 3 * 2 * m * d:
        pytest.skip("less than 13 GB of free GPU memory")
    W = torch.empty(m, d, device="cuda", dtype=torch.bfloat16).normal_()
    x = torch.randn(8, d, device="cuda", dtype=torch.bfloat16)
    got = fusae.encode_topk(x, W, None, 32, "none", backend="triton")
    pre = torch.cat([(x.float() @ part.float().T) for part in W.split(2**17)], 1)
    wanted = torch.topk(pre, 32)
    assert_equal(got.indices.long().sort(1).values, wanted.indices.sort(1).values)

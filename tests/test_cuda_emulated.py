# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, but for the encoders, run on the CPU from their own sources: see csrc/cuda/emulated."""

import importlib.util
import subprocess
from pathlib import Path

import pytest
import torch

from fusae import _dispatch, reference
from fusae.backends import cuda
from fusae.backends.cuda import latents
from fusae.backends.cuda.codes import Codes
from fusae.testing import CASES, Target, assert_equal, assert_within_budget
from fusae.testing.conformance import check_backward, check_forward

_spec = importlib.util.spec_from_file_location("cuda_emulator", Path(__file__).parent / "cuda_emulator.py")
cuda_emulator = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cuda_emulator)

if (reason := cuda_emulator.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.kernels
CUDA = Target("cuda")
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ROWS, ELEMENTS = 40, 400_000  # of a case: a barrier takes 10 us for a block


@pytest.fixture(autouse=True)
def _emulated():
    with cuda_emulator.emulation():
        yield


def run(op, *args, **kwargs):
    return cuda.TABLE[op][0](*args, **kwargs)


def _small(case):
    rows = case.shape.get("n", 1)
    width = max(case.shape.get("m", 1), case.shape.get("d", 1) * max(1, case.shape.get("k", 1)))
    return rows <= ROWS and rows * width <= ELEMENTS


def _cases():
    for case in CASES:
        if not case.op.startswith("encode") and _small(case):
            for dtype in case.dtypes:
                if dtype != torch.float64:
                    yield pytest.param(case, dtype, id=f"{case}-{NAMES[dtype]}")


@pytest.mark.parametrize(("case", "dtype"), list(_cases()))
def test_conformance(case, dtype):
    check_forward(case, CUDA, dtype)
    if case.op != "adam_rows_":
        check_backward(case, CUDA, dtype)


def test_it_is_there_by_name_only():
    assert _dispatch.by_name_only("cuda") == "emulated on the CPU: only when asked for by name"
    assert CUDA.interpreted and CUDA.device.type == "cpu"


# --- topk -----------------------------------------------------------------------------------------------------------


def keys(pre):
    """Rows with much to cut: rising (every block passes the bound), falling, equal, few distinct values, special."""
    m = pre.shape[1]
    up = torch.arange(m, dtype=torch.float32)
    special = torch.where(up % 7 == 0, torch.nan, torch.where(up % 5 == 0, -torch.inf, -0.0))
    return torch.stack([up, -up, torch.zeros(m), up % 3, special, pre[0].float()]).to(pre.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("m", "k"), [(9000, 5), (9001, 1500), (9000, 2048), (4099, 2049), (2500, 2500), (64, 64)])
def test_topk_of_adversarial_rows(m, k, dtype):
    """Exactly the selection of the reference, whatever the row, cut once or often, in one pass or in several."""
    pre = keys(torch.randn(1, m).to(dtype))
    values, indices = run("topk_fwd", pre, k)
    wanted_values, wanted_indices = reference.topk_fwd(pre, k)
    assert_equal(indices, wanted_indices, "indices")
    assert_equal(values, wanted_values, "values")


def test_plans_of_topk_fit_a_block():
    """The buffer holds k, a block of new keys and what the last sort needs; with it two blocks share a GPU's 99 KB."""
    for k in (1, 64, 1000, 2048):
        for block in (256, 1024, 2048):
            capacity, size = cuda_emulator.emulated().topk_plan(k, block)
            assert size >= k and size & (size - 1) == 0
            assert capacity >= max(k + block, size) and 2 * 8 * capacity <= 99 * 1024


# --- sums by latent -------------------------------------------------------------------------------------------------


def entries(n, m, k, seed=0, hot=0):
    """Codes of which `hot` entries a row are of latents 0, 1 ...; some values are 0."""
    gen = torch.Generator().manual_seed(seed)
    indices = torch.stack([torch.randperm(m - hot, generator=gen)[:k] + hot for _ in range(n)])
    indices[:, :hot] = torch.arange(hot)
    values = torch.randn(n, k, generator=gen)
    values[torch.rand(n, k, generator=gen) < 0.1] = 0.0
    return values, indices.to(torch.int32)


@pytest.mark.parametrize("hot", [0, 1, 3])
@pytest.mark.parametrize("chunk", [3, 16, 64])
@pytest.mark.parametrize("row_sparse", [False, True])
def test_hot_latents_are_summed_in_chunks(monkeypatch, hot, chunk, row_sparse):
    """A latent of every row beside latents of few, however the windows of chunks lie."""
    monkeypatch.setattr(latents, "CHUNK", chunk)
    n, m, d, k = 37, 50, 40, 5
    values, indices = entries(n, m, k, seed=chunk, hot=hot)
    W, grad = torch.randn(m, d), torch.randn(n, d)
    got = run("decode_bwd", grad, values, indices, None, W, True, True, row_sparse)
    wanted = reference.decode_bwd(grad, values, indices, None, W, True, True, row_sparse)
    exact = reference.decode_bwd(grad.double(), values.double(), indices, None, W.double(), True, True, row_sparse)
    assert_equal(got[1], wanted[1], "rows")
    for place, name in ((0, "value gradients"), (2, "weight gradient")):
        assert_within_budget(got[place], wanted[place], exact[place], name)


def test_runs_agree_in_every_bit():
    """Threads and blocks run in another order at every launch of the emulation; nothing may show it."""
    n, m, d, k = 33, 60, 72, 6
    values, indices = entries(n, m, k, hot=2)
    W, x, b, grad = torch.randn(m, d), torch.randn(n, d), torch.randn(d), torch.randn(n, k)
    calls = [
        lambda: run("topk_fwd", torch.randn(4, 5000, generator=torch.Generator().manual_seed(1)), 300),
        lambda: run("decode_loss_fwd", values, indices, None, W, b, x, [20, 60], [2.0, 0.5], False, True, True),
        lambda: run("decode_bwd", x, values, indices, None, W, True, True, True),
        lambda: run("encode_bwd", grad, indices, None, x, W, True, True, True, False),
        lambda: run("codes_from_dense_fwd", (torch.arange(900.0).view(9, 100) % 3), None),
    ]
    for call in calls:
        first = call()
        for _ in range(3):
            for a, b_ in zip(first, call(), strict=True):
                assert_equal(a, b_, "another run")


def test_losses_whose_residuals_do_not_fit_shared_memory():
    """Ten groups of 1500 columns are kept in global memory: the same results as two of 64."""
    n, m, d, k = 3, 40, 1500, 7
    values, indices = entries(n, m, k)
    W, x, ends, mix = torch.randn(m, d), torch.randn(n, d), list(range(4, 41, 4)), [1.0] * 10
    assert not cuda_emulator.emulated().loss_plan(d, 10, k, 4, True, True, 99 << 10)[0]
    args = (values, indices, None, W, None, x, ends, mix, False, True, True)
    double = (values.double(), indices, None, W.double(), None, x.double(), *args[6:])
    results = run("decode_loss_fwd", *args), reference.decode_loss_fwd(*args), reference.decode_loss_fwd(*double)
    for name, got, wanted, exact in zip(("sse", "residual", "mixed", "dots"), *results, strict=True):
        assert_within_budget(got, wanted, exact, name)


def test_plan_of_a_loss():
    """What is kept on chip leaves room for two blocks; rows are cached only with all residuals, and only for dots."""
    plan = cuda_emulator.emulated().loss_plan
    limit = 227 << 10
    assert plan(768, 1, 32, 2, True, True, limit) == (True, 32, 768 * 4 + 32 * 768 * 2)
    assert plan(768, 1, 32, 2, True, False, limit) == (True, 0, 768 * 4)
    assert plan(4096, 1, 64, 2, True, True, limit) == (True, 0, 4096 * 4)  # 512 KB of rows
    assert plan(768, 1, 0, 2, True, True, limit) == (True, 0, 768 * 4)  # ragged: no telling
    assert plan(4096, 8, 64, 2, True, True, limit) == (False, 0, 0)
    assert plan(768, 1, 32, 2, False, False, limit) == (False, 0, 0)


# --- bad contents ---------------------------------------------------------------------------------------------------


def test_contents_that_no_one_checked(monkeypatch):
    """As on a GPU: a latent outside the dictionary makes its row NaN and gets no gradient; no entry past the storage
    is read."""
    monkeypatch.setattr(Codes, "_check", lambda self: None)
    values, indices = entries(4, 20, 3)
    indices[1, 2], indices[2, 0] = 20, -1
    values[1, 2] = values[2, 0] = 1.0
    W, grad = torch.randn(20, 8), torch.randn(4, 8)
    y = run("decode_fwd", values, indices, None, W, None)
    assert y[1:3].isnan().all() and not y[[0, 3]].isnan().any()
    grad_values, _, grad_W = run("decode_bwd", grad, values, indices, None, W, True, True, False)
    assert grad_values[1, 2] == 0 and grad_values[2, 0] == 0 and not grad_W.isnan().any()
    offsets = torch.tensor([0, 3, 6, 9, 100])
    y = run("decode_fwd", values.flatten()[:10], indices.flatten()[:10], offsets, W, None)
    assert_equal(y[3], values[3, 0] * W[indices[3, 0]], "a row whose storage ended")


def test_prefixes_beyond_the_limit_are_refused():
    values, indices = entries(2, 20, 3)
    W, x = torch.randn(20, 8), torch.randn(2, 8)
    args = (values, indices, None, W, None, x, [1] * 257, [1.0] * 257, True, False, False)
    assert _dispatch.why_not("decode_loss_fwd", "cuda", args) == "at most 256 prefixes, got 257"


# --- plans and the emulation itself ---------------------------------------------------------------------------------


def test_plans_of_gathers():
    plan = cuda_emulator.emulated().gather_plan
    for d, vector in ((1, 1), (7, 1), (64, 8), (576, 8), (4096, 8), (4104, 8), (100_000, 4)):
        threads, blocks = plan(d, vector)
        assert threads % 32 == 0 and 32 <= threads <= 256
        assert (blocks - 1) * threads * vector < d <= blocks * threads * vector
    width = cuda_emulator.emulated().vector_width
    assert [width(768, 2, 256), width(770, 2, 256), width(768, 2, 258), width(768, 4, 0)] == [8, 1, 1, 4]
    assert [cuda_emulator.emulated().key_bits(m) for m in (1, 2, 3, 4, 2**20)] == [1, 2, 2, 3, 21]


def test_launches_beyond_the_limits_name_the_op():
    wanted = r"decode\(n=3000000000, d=8, m=7, entries=15\) on CUDA device 0: invalid configuration"
    with pytest.raises(RuntimeError, match=wanted):
        cuda_emulator.emulated().decode((0, 0, 0, 0, 3_000_000_000, 3, 15, 7), 0, 0, 0, 0, 8, 0)


RACE = """
#include <cuda_runtime.h>
__global__ void reverse(int* out, bool barrier, bool stuck) {
  __shared__ int held[64];
  held[threadIdx.x] = threadIdx.x;
  if (barrier) __syncthreads();
  out[threadIdx.x] = held[63 - threadIdx.x];
  if (stuck && threadIdx.x < 7) __syncwarp();
}
int main(int argc, char** argv) {
  cudaLaunchConfig_t config{dim3(1), dim3(64), 0, nullptr};
  for (int launch = 0; launch < 4; ++launch) {
    int out[64];
    cudaLaunchKernelEx(&config, reverse, out, argv[1][0] == 'b', argc > 2);
    for (int i = 0; i < 64; ++i) if (out[i] != 63 - i) return 3;
  }
}
"""


def test_the_emulation_shows_a_missing_barrier(tmp_path):
    """A kernel that reads what another thread is yet to write is found out, and so is a warp that never meets."""
    (tmp_path / "race.cpp").write_text(RACE)
    folder = cuda_emulator.ROOT / "csrc/cuda/emulated"
    build = ["g++", "-std=c++17", "-O1", "-U_FORTIFY_SOURCE", f"-I{folder}", "-o", str(tmp_path / "race")]
    subprocess.run([*build, str(tmp_path / "race.cpp")], check=True)
    codes = [subprocess.run([tmp_path / "race", *args], capture_output=True, text=True) for args in ("b", "n", "bs")]
    assert codes[0].returncode == 0, "with a barrier every order gives the same"
    assert codes[1].returncode == 3
    stuck = codes[2]
    assert stuck.returncode != 0 and "emulated CUDA:" in stuck.stderr

# SPDX-License-Identifier: Apache-2.0
"""The encoders of the CUDA backend, run on the CPU from their own sources: see csrc/cuda/emulated.

Inputs are small integers: every product is exact, whatever computes it, so results are compared bit for bit, ties and
all. With `hopper` the kernels of TMA, wgmma and clusters run: descriptors, swizzle, barriers and the layout of
accumulators as the PTX ISA describes them.
"""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fusae import reference
from fusae.backends.cuda import encode, encode_plan, native, ragged
from fusae.testing import assert_equal

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("cuda_emulator", ROOT / "tests/cuda_emulator.py")
cuda_emulator = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cuda_emulator)

pytestmark = pytest.mark.kernels
OUTPUTS = {
    "encode_topk_fwd": ("values", "indices", "auxiliary values", "auxiliary indices"),
    "encode_threshold_fwd": ("values", "indices", "offsets", "state", "l0"),
    "encode_batch_topk_fwd": ("values", "indices", "offsets", "smallest", "auxiliary values", "auxiliary indices"),
}


@pytest.fixture
def emulation():
    if (reason := cuda_emulator.missing()) is not None:
        pytest.skip(reason)
    with cuda_emulator.emulation():
        yield


@pytest.fixture(params=["portable", "hopper"])
def gemm(request, emulation, monkeypatch):
    monkeypatch.setattr(encode, "HOPPER_EMULATED", request.param == "hopper")
    monkeypatch.setattr(encode_plan, "SMALLEST_M", 512)
    return request.param


def integers(n, d, m, dtype=torch.float32, largest=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n, d), (m, d), (m,))
    return [torch.randint(-largest, largest + 1, s, generator=generator).to(dtype) for s in shapes]


def assert_as_reference(function, *args):
    name = function.__name__
    got, wanted = function(*args), getattr(reference, name)(*args)
    for what, a, b in zip(OUTPUTS[name], got, wanted, strict=True):
        assert_equal(a, b.to(a.dtype), what)


# --- products and selections ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("n", "d"), [(5, 70), (200, 20), (3, 576)], ids=["tail", "cluster", "deep"])
def test_topk(gemm, dtype, n, d):
    x, W, b = integers(n, d, 600, dtype, largest=1)
    assert_as_reference(encode.encode_topk_fwd, x, W, b, None, None, 9, 0, "relu", "topk")


def test_rows_of_a_cluster_several_tiles_and_every_piece_of_the_ring(gemm):
    x, W, b = integers(130, 576, 600, torch.bfloat16, largest=1)
    assert_as_reference(encode.encode_topk_fwd, x, W, b, None, None, 9, 0, "none", "topk")


def test_float32_products_are_float32(emulation):
    """One part in 2²⁰ apart: neither TF32 nor bfloat16 tells them."""
    x = torch.ones(2, 9)
    W = torch.ones(300, 9)
    W[:, 4] += torch.arange(300) * 2.0**-20
    assert_as_reference(encode.encode_topk_fwd, x, W, None, None, None, 7, 0, "none", "topk")


def test_scores_masks_and_places_to_fill(gemm):
    x, W, b = integers(4, 16, 2200, torch.float16)
    few = torch.zeros(2200, dtype=torch.bool)
    few[[5, 900]] = True
    many = torch.arange(2200) % 3 > 0
    for mask, select, activation in ((many, "topk", "relu"), (few, "abs", "none")):
        assert_as_reference(encode.encode_topk_fwd, x, W, b, torch.full((2200,), 2.0), mask, 9, 12, activation, select)


@pytest.mark.parametrize("pattern", ["zeros", "equal", "nan", "infinite", "all_pass", "rising"])
def test_rows_that_no_sample_suits(gemm, pattern):
    x, W, b = integers(3, 16, 2200, torch.bfloat16)
    if pattern == "zeros":
        x, b = x * 0, b * 0
    elif pattern == "equal":
        W[:] = W[0]
        b[:] = 1
    elif pattern == "nan":
        W[700, 3] = float("nan")
        x[1, 0] = float("nan")
    elif pattern == "infinite":
        b[[3, 1999]], b[55] = float("inf"), -float("inf")
    elif pattern == "all_pass":  # all is in one range of latents, which the sample hardly sees
        b[640:700] += 64
    else:
        b = (torch.arange(2200) // 16).to(torch.bfloat16)
    for k in (1, 9, 300):
        got = encode.encode_topk_fwd(x, W, b, None, None, k, 0, "none", "topk")
        wanted = reference.encode_topk_fwd(x, W, b, None, None, k, 0, "none", "topk")
        assert_equal(got[1], wanted[1], "indices")
        assert torch.equal(got[0].nan_to_num(nan=1e30), wanted[0].nan_to_num(nan=1e30))


@pytest.mark.parametrize("k", [2200, 1500])
def test_k_of_any_size(emulation, k):
    x, W, b = integers(2, 8, 2200)
    assert_as_reference(encode.encode_topk_fwd, x, W, b, None, None, k, 0, "none", "topk")


def test_rows_in_several_calls(emulation, monkeypatch):
    monkeypatch.setattr(encode_plan, "REPAIR_BYTES", 1)
    x, W, b = integers(300, 8, 200)
    assert_as_reference(encode.encode_topk_fwd, x, W, b, None, None, 5, 0, "relu", "topk")


@pytest.mark.parametrize("k", [8, 110, 550])
def test_group_max(gemm, k):
    x, W, b = integers(3, 16, 2200, torch.bfloat16)
    for norms in (None, 1.0 + torch.arange(2200) % 4):
        assert_as_reference(encode.encode_topk_fwd, x, W, b, norms, None, k, 0, "relu", "group_max")


@pytest.mark.parametrize("layout", ["transposed", "odd_width", "rows_apart"])
def test_layouts(gemm, layout):
    x, W, b = integers(3, 24, 700, torch.bfloat16)
    if layout == "transposed":
        x, W = x.T.contiguous().T, W.T.contiguous().T
    elif layout == "odd_width":
        x, W = x[:, :23], W[:, 1:]
    else:
        x, W = torch.cat([x, x], 1)[:, :24], torch.cat([W, W], 1)[:, :24]
    assert_as_reference(encode.encode_topk_fwd, x, W, b, None, None, 5, 0, "relu", "topk")


# --- ragged -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [None, 50, 9000])
@pytest.mark.parametrize("bandwidth", [0.0, 3.0])
@pytest.mark.parametrize("threshold", [8.0, -1000.0], ids=["few", "all"])
def test_threshold(gemm, capacity, bandwidth, threshold):
    x, W, b = integers(6, 16, 1500, torch.bfloat16)
    limits = torch.full((1500,), threshold)
    limits[7] = float("nan")
    assert_as_reference(ragged.encode_threshold_fwd, x, W, b, limits, None, bandwidth, capacity)


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("pattern", ["integers", "zeros", "one_row", "norms"])
def test_batch_topk(gemm, activation, pattern):
    x, W, b = integers(6, 16, 1500, torch.bfloat16)
    norms = (1.0 + torch.arange(1500) % 2) if pattern == "norms" else None
    if pattern == "zeros":
        x, b = x * 0, b * 0
    elif pattern == "one_row":
        x[:5] = 0
    assert_as_reference(ragged.encode_batch_topk_fwd, x, W, b, norms, None, 11, 0, activation)


def test_no_rows(emulation):
    x, W, b = integers(0, 8, 300)
    assert_as_reference(encode.encode_topk_fwd, x, W, b, None, None, 5, 0, "relu", "topk")
    assert_as_reference(ragged.encode_threshold_fwd, x, W, b, torch.zeros(300), None, 0.0, None)
    assert_as_reference(ragged.encode_batch_topk_fwd, x, W, b, None, None, 5, 0, "relu")


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "k"), [(131_072, 64), (1_048_576, 32), (32_768, 32), (16_384, 64)])
def test_a_sample_fits_its_kernels(m, k):
    s = encode_plan.sample(m, k)
    assert s.size % encode_plan.RUN == 0 and s.size <= 16_384 and m // (s.size // encode_plan.RUN) >= encode_plan.RUN
    assert s.rank * m / s.size < s.cap <= encode_plan.LARGEST_CAP and s.cap >= k
    assert s.cap & (s.cap - 1) == 0


@pytest.mark.parametrize(("n", "k"), [(1, 1), (8192, 64), (129, 2000), (70_000, 1024)])
def test_every_block_of_rows_has_a_unit_of_the_repair(n, k):
    r = encode_plan.repair(n, 131_072, k, 132)
    assert r.units >= -(-n // encode_plan.ROWS) and r.cap >= k + encode_plan.ROWS and r.cap & (r.cap - 1) == 0
    assert r.splits == 1 or r.splits * k <= encode_plan.MERGED


def test_clusters(emulation):
    plan = native.module().hopper_plan
    assert plan(128, 131_072, 132) == (1, 132) and plan(8192, 131_072, 132) == (2, 66)
    assert plan(129, 256, 132) == (2, 1) and plan(0, 256, 132) == (1, 0)


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_hopper_kernels_use_its_instructions_and_spill_nothing(tmp_path):
    triton = importlib.util.find_spec("triton")
    dumper = shutil.which("cuobjdump") or triton and f"{Path(triton.origin).parent}/backends/nvidia/bin/cuobjdump"
    if not dumper or not Path(dumper).exists():
        pytest.skip("cuobjdump is neither installed nor a part of Triton here")
    cubin = tmp_path / "encode_hopper.cubin"
    command = ["nvcc", "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v",
               f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}", "-cubin",
               str(ROOT / "csrc/cuda/encode_hopper.cu"), "-o", str(cubin)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "warning" not in done.stderr, done.stderr
    reports = done.stderr.split("Compiling entry function ")[1:]
    hot = [report for report in reports if "GroupMax" not in report]  # few ask for groups: it may keep a little in L1
    assert len(reports) == 8 and len(hot) == 6
    assert all("0 bytes stack frame, 0 bytes spill stores" in report for report in hot), hot
    sass = subprocess.run([dumper, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    kernels = sass.split("Function : ")[1:]
    assert len(kernels) == 8
    for kernel in kernels:
        assert "HGMMA.64x256x16.F32" in kernel and "UTMALDG.2D.MULTICAST" in kernel and "USETMAXREG" in kernel
        assert "MEMBAR" not in kernel.split("HGMMA", 1)[1].split("BAR.SYNC", 1)[0], "a fence in the main loop"

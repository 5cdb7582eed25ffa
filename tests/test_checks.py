# SPDX-License-Identifier: Apache-2.0
"""Bad input of the public ops: an error that names argument, wanted and given, before anything runs."""

import math
import warnings

import pytest
import torch

import fusae
from fusae import SparseCodes, _dispatch
from fusae.testing import targets

N, D, M, K = 5, 8, 40, 3
META = torch.device("meta")


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch):
    """A bad call must not reach a backend."""

    def select(op, *args, **kwargs):
        raise AssertionError(f"{op} was dispatched")

    monkeypatch.setattr(_dispatch, "select", select)


def _x(*shape, **options):
    return torch.zeros(*(shape or (N, D)), **options)


def _W(*shape, **options):
    return torch.zeros(*(shape or (M, D)), **options)


def _codes(k=K, m=M, dtype=torch.float32, device=None):
    return SparseCodes(
        torch.ones(N, k, dtype=dtype, device=device), torch.arange(k, dtype=torch.int32, device=device).expand(N, k), m
    )


def _mask(true=10):
    return torch.arange(M) < true


ENCODE = {
    "x list": (dict(x=[1.0]), TypeError, "x must be a torch.Tensor, got list"),
    "x int": (
        dict(x=_x(dtype=torch.int64)),
        TypeError,
        "x must be float32, bfloat16, float16 or float64, got torch.int64",
    ),
    "x complex": (dict(x=_x(dtype=torch.complex64)), TypeError, "x must be .* got torch.complex64"),
    "x scalar": (dict(x=torch.tensor(1.0)), ValueError, r"x must have shape \[\.\.\., d\], got a scalar"),
    "x no width": (dict(x=_x(N, 0), W_enc=_W(M, 0)), ValueError, "x must have at least one dimension .* got d = 0"),
    "x sparse": (dict(x=_x().to_sparse()), TypeError, "x must be a dense tensor, got layout .*sparse_coo.*to_dense"),
    "W sparse": (dict(W_enc=_W().to_sparse()), TypeError, "W_enc must be a dense tensor, got layout torch.sparse_coo"),
    "W mkldnn": (dict(W_enc=_W().to_mkldnn()), TypeError, "W_enc must be a dense tensor, got layout torch._mkldnn"),
    "b sparse": (dict(b_enc=_x(M).to_sparse()), TypeError, "b_enc must be a dense tensor"),
    "mask sparse": (dict(aux_mask=_mask().to_sparse(), k_aux=2), TypeError, "aux_mask must be a dense tensor"),
    "W None": (dict(W_enc=None), TypeError, "W_enc must be a torch.Tensor, got NoneType"),
    "W transposed": (
        dict(W_enc=_W(D, M)),
        ValueError,
        r"W_enc must have shape \[m, 8\].* got \[8, 40\] \(transposed\?\)",
    ),
    "W narrow": (dict(W_enc=_W(M, 7)), ValueError, r"W_enc must have shape \[m, 8\].* to match x, got \[40, 7\]$"),
    "W 3-D": (dict(W_enc=_W(1, M, D)), ValueError, r"W_enc must have shape .* got \[1, 40, 8\]"),
    "W empty": (dict(W_enc=_W(0, D)), ValueError, "W_enc must have at least one latent"),
    "W dtype": (
        dict(W_enc=_W(dtype=torch.bfloat16)),
        TypeError,
        "W_enc must have dtype torch.float32 like x, got torch.bfloat16",
    ),
    "W device": (dict(W_enc=_W(device=META)), ValueError, "W_enc must be on cpu like x, got meta"),
    "b shape": (dict(b_enc=_x(D)), ValueError, r"b_enc must have shape \[40\] \(one per latent\), got \[8\]"),
    "b 2-D": (dict(b_enc=_x(1, M)), ValueError, r"b_enc must have shape \[40\] .* got \[1, 40\]"),
    "b dtype": (dict(b_enc=_x(M, dtype=torch.float16)), TypeError, "b_enc must have dtype torch.float32"),
    "b device": (dict(b_enc=_x(M, device=META)), ValueError, "b_enc must be on cpu"),
    "b float": (dict(b_enc=0.0), TypeError, "b_enc must be a torch.Tensor, got float"),
    "k 0": (dict(k=0), ValueError, "k must be between 1 and m = 40, got 0"),
    "k -1": (dict(k=-1), ValueError, "k must be between 1 and m = 40, got -1"),
    "k > m": (dict(k=41), ValueError, "k must be between 1 and m = 40, got 41"),
    "k float": (dict(k=3.0), TypeError, "k must be an int, got float 3.0"),
    "k bool": (dict(k=True), TypeError, "k must be an int, got bool True"),
    "k None": (dict(k=None), TypeError, "k must be an int, got NoneType"),
    "activation": (dict(activation="gelu"), ValueError, "activation must be one of 'relu', 'none', got 'gelu'"),
    "select": (dict(select="bottom"), ValueError, "select must be one of .*'topk', 'abs'.* got 'bottom'"),
    "abs relu": (
        dict(select="abs"),
        ValueError,
        "activation must be 'none' with select 'abs' .a ReLU would empty the negative ones., got 'relu'",
    ),
    "norms shape": (dict(norms=_x(D)), ValueError, r"norms must have shape \[40\]"),
    "norms device": (dict(norms=_x(M, device=META)), ValueError, "norms must be on cpu"),
    "mask shape": (dict(aux_mask=_mask()[:-1], k_aux=2), ValueError, r"aux_mask must have shape \[40\]"),
    "mask dtype": (dict(aux_mask=_mask().int(), k_aux=2), TypeError, "aux_mask must be bool, got torch.int32"),
    "mask list": (dict(aux_mask=[True] * M, k_aux=2), TypeError, "aux_mask must be a torch.Tensor, got list"),
    "k_aux 0": (dict(aux_mask=_mask()), ValueError, "k_aux must be between 1 and m = 40, got 0"),
    "k_aux > m": (dict(aux_mask=_mask(), k_aux=41), ValueError, "k_aux must be between 1 and m = 40, got 41"),
    "k_aux alone": (dict(k_aux=3), ValueError, "k_aux must be 0 without aux_mask, got 3"),
    "backend": (dict(backend="tpu"), ValueError, "backend must be one of cuda, triton, cpu, reference, got 'tpu'"),
}


@pytest.mark.parametrize(("change", "error", "message"), ENCODE.values(), ids=ENCODE.keys())
def test_encode_topk(change, error, message):
    with pytest.raises(error, match=message):
        fusae.encode_topk(**{"x": _x(), "W_enc": _W(), "b_enc": None, "k": K, **change})


TOPK = {
    "list": (dict(pre=[1.0]), TypeError, "pre must be a torch.Tensor, got list"),
    "int": (dict(pre=_x(dtype=torch.int32)), TypeError, "pre must be float32, .* got torch.int32"),
    "sparse": (dict(pre=_x().to_sparse()), TypeError, "pre must be a dense tensor, got layout torch.sparse_coo"),
    "scalar": (dict(pre=torch.tensor(1.0)), ValueError, r"pre must have shape \[\.\.\., m\], got a scalar"),
    "k > m": (dict(k=9), ValueError, "k must be between 1 and m = 8, got 9"),
    "k 0": (dict(k=0), ValueError, "k must be between 1 and m = 8, got 0"),
    "k float": (dict(k=2.5), TypeError, "k must be an int, got float 2.5"),
    "no latents": (dict(pre=_x(3, 0), k=1), ValueError, "k must be between 1 and m = 0, got 1"),
    "backend": (dict(backend="CPU"), ValueError, "backend must be one of .* got 'CPU'"),
}


@pytest.mark.parametrize(("change", "error", "message"), TOPK.values(), ids=TOPK.keys())
def test_topk(change, error, message):
    with pytest.raises(error, match=message):
        fusae.topk(**{"pre": _x(), "k": K, **change})


DECODE = {
    "codes": (dict(codes=_x()), TypeError, "codes must be a fusae.SparseCodes, got Tensor"),
    "W list": (dict(W_dec=[1.0]), TypeError, "W_dec must be a torch.Tensor, got list"),
    "W sparse": (dict(W_dec=_W().to_sparse()), TypeError, "W_dec must be a dense tensor, got layout torch.sparse_coo"),
    "b sparse": (dict(b_dec=_x(D).to_sparse()), TypeError, "b_dec must be a dense tensor"),
    "W transposed": (
        dict(W_dec=_W(D, M)),
        ValueError,
        r"W_dec must have shape \[40, d\].* got \[8, 40\] \(transposed\?\)",
    ),
    "W rows": (dict(W_dec=_W(41, D)), ValueError, r"W_dec must have shape \[40, d\].* to match codes, got \[41, 8\]$"),
    "W 1-D": (dict(W_dec=_W(M)), ValueError, r"W_dec must have shape \[40, d\].* got \[40\]"),
    "W int": (dict(W_dec=_W(dtype=torch.int8)), TypeError, "W_dec must be float32, .* got torch.int8"),
    "codes dtype": (
        dict(codes=_codes(dtype=torch.float16)),
        TypeError,
        "codes must have dtype torch.float32 like W_dec",
    ),
    "codes device": (dict(codes=_codes(device=META)), ValueError, "codes must be on cpu like W_dec, got meta"),
    "b shape": (dict(b_dec=_x(M)), ValueError, r"b_dec must have shape \[8\] \(one per output dimension\), got \[40\]"),
    "b dtype": (dict(b_dec=_x(D, dtype=torch.float64)), TypeError, "b_dec must have dtype torch.float32 like W_dec"),
    "b device": (dict(b_dec=_x(D, device=META)), ValueError, "b_dec must be on cpu"),
    "backend": (dict(backend=""), ValueError, "backend must be one of"),
}


@pytest.mark.parametrize(("change", "error", "message"), DECODE.values(), ids=DECODE.keys())
def test_decode(change, error, message):
    with pytest.raises(error, match=message):
        fusae.decode(**{"codes": _codes(), "W_dec": _W(), "b_dec": None, **change})


def _sparse(dtype=torch.float32, sparse_dim=1, shape=(M, D)):
    return torch.zeros(shape, dtype=dtype).to_sparse(sparse_dim)


def _csr():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in beta state"
        return torch.zeros(M, D).to_sparse_csr()


_SAME = _W()
ADAM = {
    "param list": (dict(param=[1.0]), TypeError, "param must be a torch.Tensor, got list"),
    "param int": (dict(param=_W(dtype=torch.int64)), TypeError, "param must be float32"),
    "param strided": (dict(param=_W(D, M).T), ValueError, "param must be a contiguous .* strides"),
    "param 1-D": (dict(param=_W(M)), ValueError, r"param must be a contiguous \[m, d\] matrix, got \[40\]"),
    "param sparse": (dict(param=_sparse()), TypeError, "param must be a dense tensor"),
    "exp_avg shape": (
        dict(exp_avg=_W(M, 7)),
        ValueError,
        r"exp_avg must be contiguous and have shape \[40, 8\] for .* got \[40, 7\], strides \(7, 1\)",
    ),
    "exp_avg strided": (dict(exp_avg=_W(D, M).T), ValueError, r"exp_avg must be contiguous .* strides \(1, 40\)"),
    "exp_avg sparse": (dict(exp_avg=_sparse()), TypeError, "exp_avg must be a dense tensor"),
    "moments twice": (
        dict(exp_avg=_SAME, exp_avg_sq=_SAME),
        ValueError,
        "param, exp_avg and exp_avg_sq must be three tensors, got the same one twice",
    ),
    "moment is param": (
        dict(param=_SAME, exp_avg=_SAME),
        ValueError,
        "param, exp_avg and exp_avg_sq must be three tensors, got the same one twice",
    ),
    "exp_avg dtype": (
        dict(exp_avg=_W(dtype=torch.float16)),
        TypeError,
        "exp_avg must be float32, bfloat16 or uint8 for a torch.float32 parameter, got torch.float16",
    ),
    "exp_avg rounded": (dict(exp_avg=_W(dtype=torch.bfloat16)), ValueError, "seed must be given: exp_avg in .*"),
    "exp_avg_sq": (dict(exp_avg_sq=None), TypeError, "exp_avg_sq must be a torch.Tensor, got NoneType"),
    "exp_avg_sq device": (dict(exp_avg_sq=_W(device=META)), ValueError, "exp_avg_sq must be on cpu"),
    "grad shape": (dict(grad=_W(D, M)), ValueError, r"grad must have shape \[40, 8\] like param, got \[8, 40\]"),
    "grad dtype": (dict(grad=_W(dtype=torch.float16)), TypeError, "grad must have dtype torch.float32 like param"),
    "grad None": (dict(grad=None), TypeError, "grad must be a torch.Tensor, got NoneType"),
    "grad by element": (dict(grad=_sparse(sparse_dim=2)), ValueError, r"sparse over rows only \(sparse_dim 1\), got 2"),
    "grad csr": (dict(grad=_csr()), ValueError, "grad must be dense or .*sparse_coo"),
    "masked dense": (dict(masked=True), ValueError, "masked=True needs a sparse_coo grad"),
    "masked decay": (
        dict(masked=True, grad=_sparse(), weight_decay=0.1),
        ValueError,
        "weight_decay must be 0 with masked=True",
    ),
    "step 0": (dict(step=0), ValueError, "step must be an int >= 1, got 0"),
    "step float": (dict(step=1.5), ValueError, "step must be an int >= 1, got 1.5"),
    "step bool": (dict(step=True), ValueError, "step must be an int >= 1, got True"),
    "betas number": (dict(betas=0.9), TypeError, r"betas must be two numbers \(beta1, beta2\), got 0.9"),
    "betas three": (dict(betas=(0.9, 0.99, 0.999)), TypeError, "betas must be two numbers .* got .0.9, 0.99, 0.999."),
    "betas one": (dict(betas=(0.9,)), TypeError, "betas must be two numbers"),
    "betas text": (dict(betas=("0.9", 0.999)), TypeError, "beta1 must be a .*number, got str '0.9'"),
    "beta2 None": (dict(betas=(0.9, None)), TypeError, "beta2 must be a .*number, got NoneType"),
    "betas str": (dict(betas="ab"), TypeError, "betas must be two numbers"),
    "beta1": (dict(betas=(1.0, 0.9)), ValueError, r"beta1 must be .*less than 1, got 1.0"),
    "beta2": (dict(betas=(0.9, -0.1)), ValueError, r"beta2 must be at least 0 .*got -0.1"),
    "beta nan": (dict(betas=(math.nan, 0.9)), ValueError, r"beta1 must be .*got nan"),
    "lr None": (dict(lr=None), TypeError, "lr must be a plain number, got NoneType"),
    "lr nan": (dict(lr=math.nan), ValueError, "lr must be .*got nan"),
    "lr inf": (dict(lr=math.inf), ValueError, "lr must be .*got inf"),
    "lr negative": (dict(lr=-1e-3), ValueError, "lr must be .*got -0.001"),
    "eps nan": (dict(eps=math.nan), ValueError, "eps must be .*got nan"),
    "eps negative": (dict(eps=-1e-8), ValueError, "eps must be .*got -1e-08"),
    "weight_decay nan": (dict(weight_decay=math.nan), ValueError, "weight_decay must be .*got nan"),
    "weight_decay negative": (dict(weight_decay=-0.1), ValueError, "weight_decay must be .*got -0.1"),
}


@pytest.mark.parametrize(("change", "error", "message"), ADAM.values(), ids=ADAM.keys())
def test_adam_rows(change, error, message):
    arguments = {"param": _W(), "exp_avg": _W(), "exp_avg_sq": _W(), "grad": _W(), "lr": 1e-3, "step": 1}
    with pytest.raises(error, match=message):
        fusae.adam_rows_(**{**arguments, **change})


# --- what only the contents show --------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [t for t in targets("decode_fwd", "decode_bwd") if t.device.type == "cpu"], ids=str)
@pytest.mark.parametrize("wrong", [-1, M, 2**31 - 1])
@pytest.mark.parametrize("ragged", [False, True])
def test_decode_refuses_latents_out_of_range(target, wrong, ragged, monkeypatch):
    """On the CPU, where a look is cheap, an index outside [0, m) raises and never reads foreign memory."""
    monkeypatch.undo()
    codes = _codes()
    codes = codes.to_ragged() if ragged else codes
    indices = codes.indices.clone()
    indices.view(-1)[4] = wrong
    codes = SparseCodes(codes.values, indices, M, codes.offsets)
    with target.active(), pytest.raises(IndexError, match="ind(ex|ices)"):
        fusae.decode(codes, _W())


@pytest.mark.parametrize("target", [t for t in targets("decode_fwd", "decode_bwd") if t.device.type == "cpu"], ids=str)
@pytest.mark.parametrize(
    "offsets", [[0, 2, 1, 3, 4, 15], [0, 3, 6, 9, 12, 16], [-1, 3, 6, 9, 12, 15], [1, 3, 6, 9, 12, 15]]
)
def test_decode_refuses_impossible_offsets(target, offsets, monkeypatch):
    """Offsets start at 0, do not fall, and end inside the storage."""
    monkeypatch.undo()
    codes = _codes().to_ragged()
    assert codes.values.shape == (15,)
    codes = SparseCodes(codes.values, codes.indices, M, torch.tensor(offsets))
    with target.active(), pytest.raises(IndexError, match="offsets"):
        fusae.decode(codes, _W())

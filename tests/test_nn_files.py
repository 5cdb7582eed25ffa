# SPDX-License-Identifier: Apache-2.0
"""Saved coders: exact round trips, and a clear error before any work for every file that is not a coder."""

import json

import pytest
import safetensors.torch
import torch

from fusae.formats import FormatError, native
from fusae.nn import SparseCoder, SparseCoderConfig


def make(dtype="float32", **fields):
    coder = SparseCoder(SparseCoderConfig(**({"d": 6, "m": 20, "k": 4, "k_aux": 5, "dtype": dtype} | fields)))
    with torch.no_grad():
        coder.b_enc.normal_()
        coder.b_dec.normal_()
    return coder


@pytest.fixture
def folder(tmp_path):
    return make().save(tmp_path / "coder")


def edit(folder, **changes):
    path = folder / "coder.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_config(folder, **changes):
    edit(folder, config=json.loads((folder / "coder.json").read_text())["config"] | changes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_round_trip_is_exact(tmp_path, dtype):
    coder = make(dtype, select_by_norm=True)
    loaded = SparseCoder.load(coder.save(tmp_path / "new" / "folder"))
    assert loaded.config == coder.config
    for (name, ours), (_, theirs) in zip(coder.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype and theirs.requires_grad, name
    x = torch.randn(7, 6).to(coder.W_enc.dtype)
    assert torch.equal(coder(x), loaded(x))
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["coder.json", "coder.safetensors"]


def test_other_tools_can_read_the_weights(folder):
    weights = safetensors.torch.load_file(folder / "coder.safetensors")
    assert {name: list(w.shape) for name, w in weights.items()} == {
        "W_enc": [20, 6], "b_enc": [20], "W_dec": [20, 6], "b_dec": [6],
    }  # fmt: skip


def test_saving_again_replaces(folder):
    changed = make()
    changed.save(folder)
    assert torch.equal(SparseCoder.load(folder).b_enc, changed.b_enc)


def test_a_failed_write_leaves_the_old_file(folder, monkeypatch):
    before = SparseCoder.load(folder)

    def fail(tensors, path, header):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(native.safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        make().save(folder)
    assert torch.equal(SparseCoder.load(folder).b_enc, before.b_enc)
    assert sorted(p.name for p in folder.iterdir()) == ["coder.json", "coder.safetensors"]


def test_a_cast_module_is_not_saved_under_its_old_dtype(tmp_path):
    with pytest.raises(ValueError, match="W_enc is torch.bfloat16, config.dtype says 'float32'"):
        make().bfloat16().save(tmp_path)


def test_missing_files(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"nowhere/coder.json is not there; expected a folder written by"):
        SparseCoder.load(tmp_path / "nowhere")
    (folder / "coder.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"coder.safetensors is not there; expected the weights"):
        SparseCoder.load(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(folder, keep):
    path = folder / "coder.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"coder.safetensors: truncated, damaged or no safetensors file"):
        SparseCoder.load(folder)


@pytest.mark.parametrize("keep", [0, 1, 200])
def test_truncated_description(folder, keep):
    path = folder / "coder.json"
    path.write_text(path.read_text()[:keep])
    with pytest.raises(FormatError, match=r"coder.json: truncated or no JSON"):
        SparseCoder.load(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": "sae_lens"}, r"coder.json: field 'format' must be 'fusae.SparseCoder', got 'sae_lens'"),
        ({"version": 3}, r"coder.json: field 'version' must be 2, got 3; this release of fusae does not read it"),
        ({"config": None}, r"coder.json: field 'config': the configuration must be an object, got NoneType"),
        ({"config": {"d": 6, "m": 20}}, r"coder.json: field 'config': the configuration lacks the field 'k'"),
        ({"weights": []}, r"coder.json: field 'weights' must be an object, got list"),
        ({"weights": {}}, r"coder.json: weights lacks 'W_enc'; it has none"),
        ({"save": "0"}, r"coder.safetensors: its mark 'save' is not that of coder.json"),
    ],
)
def test_foreign_description(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(FormatError, match=message):
        SparseCoder.load(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"k": 21}, "field 'config': k must be between 1 and m = 20, got 21"),
        ({"d": float("nan")}, "field 'config': d must be a whole number, got float nan"),
        ({"m": float("inf")}, "field 'config': m must be a whole number, got float inf"),
        ({"k": "4"}, "field 'config': k must be a whole number, got str '4'"),
        ({"m": 24}, r"coder.json: weights.W_enc must be float32 \[24, 6\], got float32 \[20, 6\]"),
        ({"dtype": "bfloat16"}, r"coder.json: weights.W_enc must be bfloat16 \[20, 6\], got float32 \[20, 6\]"),
        ({"theta": 1.0}, "field 'config': the configuration has no field 'theta'"),
    ],
)
def test_configuration_that_does_not_fit(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(FormatError, match=message):
        SparseCoder.load(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("b_dec"), "tensors lacks 'b_dec'; it has 'W_dec', 'W_enc', 'b_enc'"),
        (lambda w: w.update(extra=torch.zeros(2)), "tensors has 'extra', which the configuration does not call for"),
        (
            lambda w: w.update(W_enc=torch.zeros(6, 20)),
            r"tensors.W_enc must be float32 \[20, 6\], got float32 \[6, 20\]",
        ),
        (lambda w: w.update(b_enc=torch.zeros(20).half()), r"tensors.b_enc must be float32 \[20\], got float16 \[20\]"),
        (lambda w: w.update(b_enc=torch.zeros(20).int()), r"tensors.b_enc must be float32 \[20\], got int32 \[20\]"),
    ],
)
def test_weights_that_do_not_fit(folder, change, message, monkeypatch):
    path = folder / "coder.safetensors"
    weights = safetensors.torch.load_file(path)
    change(weights)
    _, header = native.open_tensors(path, "")
    native.write_tensors(path, weights, header)
    with pytest.raises(FormatError, match=rf"coder.safetensors: {message}"):
        SparseCoder.load(folder)


def test_foreign_weights(folder):
    safetensors.torch.save_file({"encoder.weight": torch.zeros(3)}, folder / "coder.safetensors")
    with pytest.raises(FormatError, match=r"coder.safetensors: its header has no entry 'fusae'"):
        SparseCoder.load(folder)


def test_nothing_is_read_before_all_is_checked(folder, monkeypatch):
    made = []
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(a))
    edit_config(folder, m=10**9, k=4)
    with pytest.raises(FormatError, match=r"must be float32 \[1000000000, 6\]"):
        SparseCoder.load(folder)
    assert not made

# SPDX-License-Identifier: Apache-2.0
"""Tensors that are corrupt, truncated, mislabelled or hostile, in safetensors, pickles and archives of numpy."""

import importlib.util
import io
import json
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch


def _sibling(name):
    """A module beside this one (tests are no package), the same one for all."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


spoiled = _sibling("formats_spoiled")
w, layers, Bomb = spoiled.w, spoiled.layers, spoiled.Bomb
edit_json, edit_tensors, lens = spoiled.edit_json, spoiled.edit_tensors, spoiled.lens
D, M, K = w.D, w.M, w.K
case = spoiled.Cases()


# --- tensors --------------------------------------------------------------------------------------------------------


@case(r"sae_weights.safetensors: truncated, damaged or no safetensors file")
def safetensors_truncated(tmp):
    path = lens(tmp)
    file = path / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    return path


@case(r"sae_weights.safetensors: truncated, damaged or no safetensors file")
def safetensors_header_of_everything(tmp):
    path = lens(tmp)
    (path / "sae_weights.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    return path


@case(r"sae_weights.safetensors: truncated, damaged or no safetensors file")
def safetensors_is_a_pickle(tmp):
    path = lens(tmp)
    (path / "sae_weights.safetensors").write_bytes(pickle.dumps(Bomb()))
    return path


@case(r"sae_weights.safetensors: truncated, damaged or no safetensors file")
def safetensors_overlap(tmp):
    """Two tensors of the same bytes."""
    path = lens(tmp)
    spec = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"W_enc": spec, "W_dec": spec}).encode()
    file = path / "sae_weights.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\x00" * 8)
    return path


@case(r"sae_weights.safetensors: the file is empty")
def safetensors_empty(tmp):
    path = lens(tmp)
    (path / "sae_weights.safetensors").write_bytes(b"")
    return path


for _name, _changes, _message in (
    ("missing", {"b_dec": None}, r"safetensors: tensor 'b_dec' is missing; there are 'W_dec', 'W_enc'"),
    ("transposed", {"W_enc": torch.zeros(M, D)}, r"'W_enc' must have shape .*got \[40, 12\] \(transposed\?\)"),
    ("scalar threshold", {"threshold": torch.tensor(1.0)}, r"'threshold' must have shape \[40\], got \[\]"),
    ("whole numbers", {"b_enc": torch.zeros(M, dtype=torch.int64)}, r"'b_enc' must be of float32, .* got I64"),
    ("8 bits", {"W_dec": torch.zeros(M, D, dtype=torch.float8_e4m3fn)}, r"'W_dec' must be of float32, .* got F8_E4M3"),
    ("NaN", {"W_dec": torch.full((M, D), torch.nan)}, r"'W_dec' holds values .* the first at \[0, 0\]: nan"),
    ("inf", {"b_dec": torch.tensor([0.0] * 11 + [torch.inf])}, r"'b_dec' holds .* the first at \[11\]: inf"),
    ("threshold of -inf", {"threshold": torch.full((M,), -torch.inf)}, r"'threshold' holds .* at \[0\]: -inf"),
    ("unknown", {"W_gate": torch.zeros(3)}, r"tensor 'W_gate' is not one that this format has"),
    ("finetuned", {"scaling_factor": torch.full((M,), 2.0)}, r"'scaling_factor' is not all 1"),
):  # fmt: skip

    def _spoil(tmp, changes=_changes):
        path = lens(tmp)
        edit_tensors(path / "sae_weights.safetensors", **changes)
        return path

    case(_message, f"tensor: {_name}")(_spoil)


@case(r"sae.safetensors: tensor 'W_dec' is missing; an encoder alone is no dictionary")
def encoder_alone(tmp):
    path = w.sparsify(tmp).path
    edit_tensors(path / "sae.safetensors", W_dec=None)
    return path


@case(r"layers from 0 on were expected, there are those of \[0, 2\]")
def a_layer_is_missing(tmp):
    path = layers.circuit_tracer(tmp)[0].path
    (path / "layer_1.safetensors").unlink()
    return path


@case(r"W_enc_1.safetensors: has .*, but the first layer has")
def a_layer_is_different(tmp):
    path = layers.clt(tmp).path
    edit_tensors(path / "W_enc_1.safetensors", threshold_1=None)
    return path


@case(r"W_dec_2.safetensors: tensor 'W_dec_2' must have shape \[40, 1, 12\], got \[40, 2, 12\]")
def decoder_of_another_layer(tmp):
    path = layers.clt(tmp).path
    edit_tensors(path / "W_dec_2.safetensors", W_dec_2=torch.zeros(M, 2, D))
    return path


@case(r"params_layer_1.safetensors: tensor 'w_dec' writes to layers before its own, 1")
def decoder_backwards(tmp):
    path = layers.clt(tmp, gemma=True).path
    edit_tensors(path / "params_layer_1.safetensors", w_dec=torch.ones(M, 3, D))
    return path


@case(r"layer_0.safetensors: tensor 'activation_function.threshold' has values below 0")
def threshold_below_zero_without_relu(tmp):
    path = layers.circuit_tracer(tmp, "jump_relu")[0].path
    edit_tensors(path / "layer_0.safetensors", activation_function__threshold=torch.full((M,), -0.5))
    return path


@case(r"layer_0.safetensors: the activation is 'topk', and neither config.yaml nor the file says k: give k=")
def topk_without_k(tmp):
    path = layers.circuit_tracer(tmp, "topk")[0].path
    (path / "config.yaml").write_text("activation: topk\n")
    return path


# --- pickles --------------------------------------------------------------------------------------------------------


@case(r"ae.pt: not read, because it is damaged or holds more than tensors .* can run code", "pickle: code, new")
def pickle_runs_code(tmp):
    path = w.dictionary_learning(tmp, "AutoEncoderTopK").path
    torch.save({"encoder.weight": Bomb()}, path / "ae.pt")
    return path


@case(r"ae.pt: not read, because it is damaged or holds more than tensors .* can run code", "pickle: code, plain")
def plain_pickle_runs_code(tmp):
    path = w.dictionary_learning(tmp, "AutoEncoderTopK").path
    (path / "ae.pt").write_bytes(pickle.dumps({"encoder.weight": Bomb()}, protocol=2))
    return path


@case(r"3.pt: not read, because it is damaged or holds more than tensors", "pickle: a whole module")
def pickle_of_a_module(tmp):
    torch.save(torch.nn.Linear(3, 3), tmp / "3.pt")
    return tmp / "3.pt"


@case(r"ae.pt: must hold a dictionary of tensors by name, got list")
def pickle_of_a_list(tmp):
    path = w.dictionary_learning(tmp, "AutoEncoderTopK").path
    torch.save([torch.zeros(3)], path / "ae.pt")
    return path


@case(r"ae.pt: truncated|ae.pt: not read")
def pickle_truncated(tmp):
    path = w.dictionary_learning(tmp, "AutoEncoderTopK").path
    (path / "ae.pt").write_bytes((path / "ae.pt").read_bytes()[:-300])
    return path


@case(r"ae.pt: (truncated|not read)")
def pickle_of_noise(tmp):
    path = w.dictionary_learning(tmp, "AutoEncoderTopK").path
    (path / "ae.pt").write_bytes(bytes(range(256)) * 8)
    return path


@case(r"ae.pt: tensor 'encoder.weight' claims shape \[1000000, 1000000\] but has only 4 bytes of memory")
def pickle_expanded(tmp):
    path = w.dictionary_learning(tmp, "AutoEncoderTopK").path
    edit_tensors(path / "ae.pt", encoder__weight=torch.zeros(1, 1).expand(10**6, 10**6))
    return path


@case(r"ae.pt: tensor 'encoder.bias' must be a plain dense one, got a sparse tensor")
def pickle_sparse(tmp):
    path = w.dictionary_learning(tmp, "AutoEncoderTopK").path
    edit_tensors(path / "ae.pt", encoder__bias=torch.zeros(M).to_sparse())
    return path


@case(r"ae.pt: tensor 'encoder.bias' must be a plain dense one, got a tensor on the device meta")
def pickle_meta(tmp):
    path = w.dictionary_learning(tmp, "AutoEncoderTopK").path
    edit_tensors(path / "ae.pt", encoder__bias=torch.zeros(M, device="meta"))
    return path


def rezipped(path, spoil):
    """The archive of a torch.save file, its entries changed by `spoil(name, data) -> (data, compression)`."""
    entries = []
    with zipfile.ZipFile(path) as archive:
        entries = [(i.filename, archive.read(i)) for i in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries:
            data, compression = spoil(name, data)
            archive.writestr(name, data, compression)


@case(r"ae.pt: \d+ bytes claim to unpack to \d+; refused")
def pickle_zip_bomb(tmp):
    path = w.dictionary_learning(tmp, "AutoEncoderTopK").path
    rezipped(path / "ae.pt", lambda n, d: (b"\x00" * 50_000_000 if n.endswith("data.pkl") else d, zipfile.ZIP_DEFLATED))
    return path


@case(r"ae.pt: entry '.*/data.pkl' is compressed, which torch.save never does")
def pickle_compressed(tmp):
    path = w.dictionary_learning(tmp, "AutoEncoderTopK").path
    rezipped(path / "ae.pt", lambda n, d: (d, zipfile.ZIP_DEFLATED if n.endswith("data.pkl") else zipfile.ZIP_STORED))
    return path


@case(r"3.pt: field 'activation_state_dict.k' must be a whole number from 1 to 40, got 400")
def openai_k(tmp):
    path = w.openai(tmp).path
    edit_tensors(path, activation_state_dict={"k": 400, "postact_fn": "ReLU"})
    return path


@case(r"3.pt: field 'activation' must be 'TopK' or 'ReLU', got 'os.system'")
def openai_activation(tmp):
    path = w.openai(tmp).path
    edit_tensors(path, activation="os.system")
    return path


@case(r"3.pt: field 'activation_state_dict.postact_fn' must be 'ReLU' or 'Identity', got 'eval'")
def openai_postact(tmp):
    path = w.openai(tmp).path
    edit_tensors(path, activation_state_dict={"k": K, "postact_fn": "eval"})
    return path


@case(r"sae.pth: m must be between 1 and 2147483647, got 0")
def no_latents(tmp):
    path = w.linear(tmp, "goodfire").path
    shapes = {"encoder_linear": ((0, D), 0), "decoder_linear": ((D, 0), D)}
    tensors = {f"{k}.{n}": torch.zeros(s) for k, (a, b) in shapes.items() for n, s in (("weight", a), ("bias", b))}
    torch.save(tensors, path)
    return path


@case(r"sae.pth: d must be at least 1, got 0")
def no_width(tmp):
    path = w.linear(tmp, "goodfire").path
    shapes = {"encoder_linear": ((M, 0), M), "decoder_linear": ((0, M), 0)}
    tensors = {f"{k}.{n}": torch.zeros(s) for k, (a, b) in shapes.items() for n, s in (("weight", a), ("bias", b))}
    torch.save(tensors, path)
    return path


# --- npz ------------------------------------------------------------------------------------------------------------


def arrays(tmp, **changes):
    path = w.gemma(tmp).path
    with np.load(path / "params.npz") as data:
        values = {name: data[name] for name in data} | changes
    np.savez(path / "params.npz", **{k: v for k, v in values.items() if v is not None})
    return path


@case(r"params.npz: array 'W_enc' holds Python objects \(\|O\), which can run code; refused")
def npz_objects(tmp):
    return arrays(tmp, W_enc=np.array([[Bomb()]], dtype=object))


@case(r"params.npz: tensor 'threshold' is missing")
def npz_missing(tmp):
    return arrays(tmp, threshold=None)


@case(r"params.npz: tensor 'W_dec' must have shape \[40, 7\]|'W_dec' must have shape \[40, 12\], got \[12, 12\]")
def npz_shape(tmp):
    return arrays(tmp, W_dec=np.zeros((12, 12), np.float32))


@case(r"params.npz: tensor 'b_enc' must be of float32, .* got >f4")
def npz_bytes_reversed(tmp):
    return arrays(tmp, b_enc=np.zeros(M, ">f4"))


@case(r"params.npz: tensor 'extra' is not one that this format has")
def npz_extra(tmp):
    return arrays(tmp, extra=np.zeros(3, np.float32))


@case(r"params.npz: tensor 'b_enc' holds values that are not finite, the first at \[7\]: nan")
def npz_nan(tmp):
    values = np.zeros(M, np.float32)
    values[7] = np.nan
    return arrays(tmp, b_enc=values)


@case(r"params.npz: \d+ bytes claim to unpack to \d+; refused")
def npz_bomb(tmp):
    path = w.gemma(tmp).path
    np.savez_compressed(path / "params.npz", W_enc=np.zeros((12, 2_000_000), np.float32))
    return path


@case(r"params.npz: array 'W_enc' claims shape \[1000000, 1000000\] of torch.float32 but holds 1920 bytes")
def npz_lies(tmp):
    path = w.gemma(tmp).path
    out = io.BytesIO()
    with zipfile.ZipFile(path / "params.npz") as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename == "W_enc.npy":
                header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }".ljust(117) + b"\n"
                data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data[-4 * M * D :]
            new.writestr(entry.filename, data)
    (path / "params.npz").write_bytes(out.getvalue())
    return path


@case(r"params.npz: array 'W_enc' is truncated or damaged")
def npz_code_in_the_header(tmp):
    path = w.gemma(tmp).path
    header = b"__import__('os').getcwd()".ljust(117) + b"\n"
    with zipfile.ZipFile(path / "params.npz", "w") as new:
        new.writestr("W_enc.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    return path


@case(r"params.npz: truncated or damaged")
def npz_truncated(tmp):
    path = w.gemma(tmp).path
    (path / "params.npz").write_bytes((path / "params.npz").read_bytes()[:200])
    return path


@case(r"params.npz: entry 'evil.sh' is no array")
def npz_with_more(tmp):
    path = w.gemma(tmp).path
    with zipfile.ZipFile(path / "params.npz", "a") as archive:
        archive.writestr("evil.sh", "echo")
    return path


@pytest.mark.parametrize("name", case)
def test_it_is_refused(tmp_path, name):
    case.check(name, tmp_path)

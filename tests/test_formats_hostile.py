# SPDX-License-Identifier: Apache-2.0
"""Files that are corrupt, truncated, mislabelled or hostile: one clear error that names file and field, and nothing in
them is executed."""

import importlib.util
import io
import json
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import fusae
from fusae.formats import FormatError


def _sibling(name):
    """A module beside this one (tests are no package)."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


w = _sibling("formats_written")
D, M, K = w.D, w.M, w.K
CASES = {}


def case(message, name=None):
    """Registers a function that spoils what is in a folder and returns the path (and hints) to load."""

    def register(spoil):
        CASES[name or spoil.__name__] = (spoil, message)
        return spoil

    return register


def edit_json(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def edit_tensors(path, **changes):
    """With tensors replaced, or left out where the value is None. Names have '__' for '.'."""
    if path.suffix == ".safetensors":
        tensors = safetensors.torch.load_file(path)
    else:
        tensors = torch.load(path, weights_only=True)
    tensors |= {name.replace("__", "."): value for name, value in changes.items()}
    tensors = {k: v for k, v in tensors.items() if v is not None}
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path)


def lens(tmp, architecture="jumprelu", **cfg):
    path = w.saelens(tmp, architecture).path
    edit_json(path / "cfg.json", **cfg)
    return path


class Bomb:
    """Leaves a mark where it is unpickled."""

    marks = []

    def __reduce__(self):
        return (Bomb.go, ())

    @staticmethod
    def go():
        Bomb.marks.append("executed")


# --- nothing there, or of nothing known -----------------------------------------------------------------------------


@case(r"of no format that is read \(fusae, saelens, .*\); in it there is nothing")
def empty_folder(tmp):
    return tmp


@case(r"of no format that is read .*; in it there is readme.txt")
def foreign_folder(tmp):
    (tmp / "readme.txt").write_text("hello")
    return tmp


@case(r"what.bin: of no format that is read .*; it is a single file")
def foreign_file(tmp):
    (tmp / "what.bin").write_bytes(b"\x00" * 100)
    return tmp / "what.bin"


@case(r"a temporal SAE, whose codes depend on other rows of the sequence, is not read")
def temporal_folder(tmp):
    for name in ("conf.yaml", "latest_ckpt.safetensors"):
        (tmp / name).write_bytes(b"")
    return tmp


@case(r"may be 'saelens' or 'dictionary_learning': give format=")
def two_formats(tmp):
    w.dictionary_learning(tmp, "AutoEncoder")
    return w.saelens(tmp, "standard").path


@case(r"ae.pt: tensor 'encoder.weight' is missing; there are 'W_enc', 'b_dec', 'b_enc'")
def mislabelled_class(tmp):
    path = w.dictionary_learning(tmp, "JumpReluAutoEncoder").path
    values = json.loads((path / "config.json").read_text())
    values["trainer"]["dict_class"] = "AutoEncoderTopK"
    (path / "config.json").write_text(json.dumps(values))
    edit_tensors(path / "ae.pt", W_dec=None, threshold=None)
    return path


@case(r"sae_weights.safetensors: tensor 'encoder.weight' is missing", "one format named as another")
def named_wrongly(tmp):
    path = w.llamascopium(tmp).path
    return path, {"format": "llama-scope"}


# --- JSON and YAML --------------------------------------------------------------------------------------------------


@case(r"cfg.json: truncated, damaged or no JSON")
def json_truncated(tmp):
    path = lens(tmp)
    (path / "cfg.json").write_text((path / "cfg.json").read_text()[:40])
    return path


@case(r"cfg.json: truncated, damaged or no JSON \(.*utf-8")
def json_binary(tmp):
    path = lens(tmp)
    (path / "cfg.json").write_bytes(b"\xff\xfe\x80" * 10)
    return path


@case(r"cfg.json: must hold an object, got list")
def json_list(tmp):
    path = lens(tmp)
    (path / "cfg.json").write_text("[1, 2]")
    return path


@case(r"cfg.json: \d+ bytes are too many for a configuration")
def json_huge(tmp):
    path = lens(tmp)
    (path / "cfg.json").write_text('{"a": "' + "x" * 5_000_000 + '"}')
    return path


@case(r"cfg.json: truncated, damaged or no JSON \(.*recursion")
def json_deep(tmp):
    path = lens(tmp)
    (path / "cfg.json").write_text("[" * 200_000 + "]" * 200_000)
    return path


@case(r"cfg.json: truncated, damaged or no JSON \(.*limit")
def json_number_without_end(tmp):
    path = lens(tmp)
    (path / "cfg.json").write_text('{"d_in": ' + "9" * 100_000 + "}")
    return path


@case(r"cfg.json: .*the key 'd_in' is there twice")
def json_key_twice(tmp):
    path = lens(tmp)
    (path / "cfg.json").write_text('{"d_in": 12, "d_in": 24}')
    return path


@case(r"config.yaml: truncated, damaged or no YAML \(aliases are not read\)")
def yaml_aliases(tmp):
    path = w.circuit_tracer(tmp)[0].path
    (path / "config.yaml").write_text('a: &a ["x","x"]\nb: &b [*a,*a]\nc: &c [*b,*b]\nmodel_kind: transcoder_set\n')
    return path


@case(r"config.yaml: 300000 bytes are too many for a configuration")
def yaml_huge(tmp):
    path = w.circuit_tracer(tmp)[0].path
    (path / "config.yaml").write_text("#" * 300_000)
    return path


@case(r"config.yaml: truncated, damaged or no YAML \(.*recursion")
def yaml_deep(tmp):
    path = w.circuit_tracer(tmp)[0].path
    (path / "config.yaml").write_text("[" * 20_000 + "]" * 20_000)
    return path


@case(r"config.yaml: truncated, damaged or no YAML \(could not determine a constructor for the tag")
def yaml_object(tmp):
    path = w.circuit_tracer(tmp)[0].path
    (path / "config.yaml").write_text("model_kind: !!python/object/apply:os.getcwd []\n")
    return path


@case(r"config.yaml: field 'model_kind' must be 'transcoder_set' beside layer_<i>.safetensors, got 'cross_layer_trans")
def yaml_kind(tmp):
    path = w.circuit_tracer(tmp)[0].path
    (path / "config.yaml").write_text("model_kind: cross_layer_transcoder\n")
    return path


# --- fields ---------------------------------------------------------------------------------------------------------

for _name, _changes, _message in (
    ("missing", {"d_in": ...}, r"cfg.json: field 'd_in' is missing; there are 'architecture'"),
    ("text for a number", {"d_in": "12"}, r"cfg.json: field 'd_in' must be a whole number, got str '12'"),
    ("negative", {"d_sae": -4}, r"cfg.json: field 'd_sae' must be between 1 and 2147483647, got -4"),
    ("enormous", {"d_sae": 2**40}, r"cfg.json: field 'd_sae' must be between 1 and 2147483647, got 1099511627776"),
    ("another size", {"d_sae": 41}, r"safetensors: tensor 'W_enc' must have shape \[12, 41\], got \[12, 40\]"),
    ("dtype", {"dtype": "float33"}, r"field 'dtype' must be one of 'float32', .*got 'float33'"),
    ("dtype of code", {"dtype": "__import__('os')"}, r"field 'dtype' must be one of 'float32', .*got"),
    ("architecture", {"architecture": "magic"}, r"field 'architecture' must be one of 'standard', .*got 'magic'"),
    ("temporal", {"architecture": "temporal"}, r"field 'architecture' is 'temporal', which is not read: its codes"),
    ("matching pursuit", {"architecture": "matching_pursuit"}, r"'matching_pursuit', which is not read: it encodes"),
    ("flag", {"apply_b_dec_to_input": "yes"}, r"field 'apply_b_dec_to_input' must be true or false, got str 'yes'"),
    ("normalisation", {"normalize_activations": "odd"}, r"'normalize_activations' must be one that SAELens has"),
    ("whitening", {"normalize_activations": "covariance_whitening"}, r"is 'covariance_whitening', and the"),
    ("reshape", {"reshape_activations": "odd"}, r"field 'reshape_activations' must be one of 'none', 'hook_z'"),
    ("version", {"metadata": {"sae_lens_version": 6}}, r"'sae_lens_version' must be a version such as .*got 6"),
    ("metadata", {"metadata": [1]}, r"cfg.json: field 'metadata' must be an object, got list"),
):  # fmt: skip
    case(_message, f"field: {_name}")(lambda tmp, changes=_changes: lens(tmp, **changes))


@case(r"cfg.json: field 'k' must be between 1 and 40, got 41")
def k_above_m(tmp):
    return lens(tmp, "topk", k=41)


@case(r"cfg.json: field 'k' must be a whole number, got float 4.5")
def k_fraction(tmp):
    return lens(tmp, "batchtopk", k=4.5)


@case(r"field 'apply_b_dec_to_input' must be false for a transcoder")
def transcoder_with_pre_bias(tmp):
    return lens(tmp, "transcoder", apply_b_dec_to_input=True)


@case(r"field 'normalize_activations' is 'layer_norm' in a transcoder, whose output")
def transcoder_with_layer_norm(tmp):
    return lens(tmp, "transcoder", normalize_activations="layer_norm")


@case(r"cfg.json: field 'activation_fn' must be 'relu' or 'topk', got 'tanh-relu'")
def old_activation(tmp):
    return w.saelens_old(tmp, activation_fn_str="tanh-relu").path


@case(r"cfg.json: field 'signed' is true")
def sparsify_signed(tmp):
    return w.sparsify(tmp, signed=True).path


@case(r"cfg.json: field 'activation' must be one of 'topk', 'groupmax', got 'relu'")
def sparsify_activation(tmp):
    path = w.sparsify(tmp).path
    edit_json(path / "cfg.json", activation="relu")
    return path


@case(r"sparsify|k must divide m = 40 with select 'group_max'")
def sparsify_groups(tmp):
    path = w.sparsify(tmp).path
    edit_json(path / "cfg.json", activation="groupmax", k=7)
    return path


@case(r"config.json: field 'trainer' is missing")
def dl_without_trainer(tmp):
    path = w.dictionary_learning(tmp, "AutoEncoderTopK").path
    (path / "config.json").write_text("{}")
    return path


@case(r"ae.pt: tensor 'k' is 5, but k of config.json is 6")
def dl_two_ks(tmp):
    path = w.dictionary_learning(tmp, "AutoEncoderTopK").path
    values = json.loads((path / "config.json").read_text())
    values["trainer"]["k"] = 6
    (path / "config.json").write_text(json.dumps(values))
    return path


@case(r"ae.pt: tensor 'group_sizes' must be above 0 and add up to 40, got \[8, 12, 21\]")
def dl_groups(tmp):
    path = w.dictionary_learning(tmp, "MatryoshkaBatchTopKSAE").path
    edit_tensors(path / "ae.pt", group_sizes=torch.tensor([8, 12, 21]))
    return path


@case(r"config.json: field 'trainer.dict_size' is 99, but the weights in ae.pt have 40")
def dl_size(tmp):
    path = w.dictionary_learning(tmp, "AutoEncoder").path
    values = json.loads((path / "config.json").read_text())
    values["trainer"]["dict_size"] = 99
    (path / "config.json").write_text(json.dumps(values))
    return path


@case(r"field 'dataset_average_activation_norm.in' must be greater than 0 and finite, got 0")
def llama_norm(tmp):
    return w_llama(tmp, dataset_average_activation_norm={"in": 0, "out": 1.0})


@case(r"field 'use_glu_encoder' is true: its encoder has two matrices")
def llama_glu(tmp):
    return w_llama(tmp, use_glu_encoder=True)


def w_llama(tmp, **changes):
    path = w.llama_scope(tmp).path
    edit_json(path / "hyperparams.json", **changes)
    return path


@case(r"config.json: field 'sae_type' is 'clt'; of llamascopium only 'sae'")
def llamascopium_type(tmp):
    path = w.llamascopium(tmp).path
    edit_json(path / "config.json", sae_type="clt")
    return path


@case(r"field 'norm_activation' is 'batch-wise', and the scale is another in every batch")
def llamascopium_norm(tmp):
    return w.llamascopium(tmp, norm="batch-wise").path


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
    path = w.circuit_tracer(tmp)[0].path
    (path / "layer_1.safetensors").unlink()
    return path


@case(r"W_enc_1.safetensors: has .*, but the first layer has")
def a_layer_is_different(tmp):
    path = w.clt(tmp).path
    edit_tensors(path / "W_enc_1.safetensors", threshold_1=None)
    return path


@case(r"W_dec_2.safetensors: tensor 'W_dec_2' must have shape \[40, 1, 12\], got \[40, 2, 12\]")
def decoder_of_another_layer(tmp):
    path = w.clt(tmp).path
    edit_tensors(path / "W_dec_2.safetensors", W_dec_2=torch.zeros(M, 2, D))
    return path


@case(r"params_layer_1.safetensors: tensor 'w_dec' writes to layers before its own, 1")
def decoder_backwards(tmp):
    path = w.clt(tmp, gemma=True).path
    edit_tensors(path / "params_layer_1.safetensors", w_dec=torch.ones(M, 3, D))
    return path


@case(r"layer_0.safetensors: tensor 'activation_function.threshold' has values below 0")
def threshold_below_zero_without_relu(tmp):
    path = w.circuit_tracer(tmp, "jump_relu")[0].path
    edit_tensors(path / "layer_0.safetensors", activation_function__threshold=torch.full((M,), -0.5))
    return path


@case(r"layer_0.safetensors: the activation is 'topk', and neither config.yaml nor the file says k: give k=")
def topk_without_k(tmp):
    path = w.circuit_tracer(tmp, "topk")[0].path
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


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused(tmp_path, name):
    spoil, message = CASES[name]
    made = spoil(tmp_path)
    path, arguments = made if isinstance(made, tuple) else (made, {})
    Bomb.marks.clear()
    with pytest.raises(FormatError, match=message) as error:
        fusae.load(path, **arguments)
    assert not Bomb.marks and str(tmp_path) in str(error.value)


def test_the_bomb_works():
    """What the tests above rely on: it is executed by whoever unpickles it carelessly."""
    Bomb.marks.clear()
    pickle.loads(pickle.dumps(Bomb()))
    assert Bomb.marks == ["executed"]


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not there"):
        fusae.load(tmp_path / "nowhere")
    path = w.saelens(tmp_path / "a", "topk").path
    (path / "cfg.json").unlink()
    with pytest.raises(
        FileNotFoundError, match="cfg.json is not there; expected the configuration of an SAE of SAELens"
    ):
        fusae.load(path, "saelens")
    path = w.clt(tmp_path / "clt").path
    (path / "W_dec_1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="W_dec_1.safetensors is not there; expected the decoder of W_enc_1"):
        fusae.load(path)
    path = w.llamascopium(tmp_path / "l").path
    (path / "sae_weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="none of sae_weights.safetensors, .* is there"):
        fusae.load(path, "llamascopium")


def test_arguments(tmp_path):
    path = w.saelens(tmp_path / "a", "topk").path
    with pytest.raises(ValueError, match="format must be one of 'fusae', 'saelens', .*got 'onnx'"):
        fusae.load(path, "onnx")
    with pytest.raises(ValueError, match="dtype must be one of 'float32', .*got 'int8'"):
        fusae.load(path, dtype="int8")
    with pytest.raises(TypeError, match="format 'saelens' takes no hint 'layer'"):
        fusae.load(path, layer=3)
    path = w.dictionary_learning(tmp_path / "b", "AutoEncoder").path
    with pytest.raises(ValueError, match="dict_class must be one of 'AutoEncoder', .*got 'Autoencoder'"):
        fusae.load(path, dict_class="Autoencoder")

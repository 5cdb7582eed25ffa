# SPDX-License-Identifier: Apache-2.0
"""Files that are corrupt, truncated, mislabelled or hostile: one clear error that names file and field, and nothing in
them is executed."""

import importlib.util
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch

import fusae


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
    path = layers.circuit_tracer(tmp)[0].path
    (path / "config.yaml").write_text('a: &a ["x","x"]\nb: &b [*a,*a]\nc: &c [*b,*b]\nmodel_kind: transcoder_set\n')
    return path


@case(r"config.yaml: 300000 bytes are too many for a configuration")
def yaml_huge(tmp):
    path = layers.circuit_tracer(tmp)[0].path
    (path / "config.yaml").write_text("#" * 300_000)
    return path


@case(r"config.yaml: truncated, damaged or no YAML \(.*recursion")
def yaml_deep(tmp):
    path = layers.circuit_tracer(tmp)[0].path
    (path / "config.yaml").write_text("[" * 20_000 + "]" * 20_000)
    return path


@case(r"config.yaml: truncated, damaged or no YAML \(could not determine a constructor for the tag")
def yaml_object(tmp):
    path = layers.circuit_tracer(tmp)[0].path
    (path / "config.yaml").write_text("model_kind: !!python/object/apply:os.getcwd []\n")
    return path


@case(r"config.yaml: field 'model_kind' must be 'transcoder_set' beside layer_<i>.safetensors, got 'cross_layer_trans")
def yaml_kind(tmp):
    path = layers.circuit_tracer(tmp)[0].path
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


@pytest.mark.parametrize("name", case)
def test_it_is_refused(tmp_path, name):
    case.check(name, tmp_path)


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
    path = layers.clt(tmp_path / "clt").path
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

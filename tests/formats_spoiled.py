# SPDX-License-Identifier: Apache-2.0
"""How files are spoiled in tests/test_formats_hostile*.py, and what has to come of it."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import fusae
from fusae.formats import FormatError


def _sibling(name):
    """A module beside this one (tests are no package), the same one for all."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


w = _sibling("formats_written")
layers = _sibling("formats_written_layers")


class Cases(dict):
    """By name: a function that spoils what is in a folder and returns the path (and hints) to load, and the message."""

    def __call__(self, message, name=None):
        def register(spoil):
            self[name or spoil.__name__] = (spoil, message)
            return spoil

        return register

    def check(self, name, folder):
        """Refused with its message, which names a file of the folder; nothing in it was executed."""
        spoil, message = self[name]
        made = spoil(folder)
        path, arguments = made if isinstance(made, tuple) else (made, {})
        Bomb.marks.clear()
        with pytest.raises(FormatError, match=message) as error:
            fusae.load(path, **arguments)
        assert not Bomb.marks and str(folder) in str(error.value)


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

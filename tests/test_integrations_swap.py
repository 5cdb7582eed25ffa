# SPDX-License-Identifier: Apache-2.0
"""The swap itself, on a made-up tool: identity, copies, pickles, subclasses, what is left alone and why."""

import copy
import io
import pickle
import sys
import types

import pytest
import torch
from torch import nn

import fusae
from fusae.integrations import SwapError, _swap


class Coder(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width))

    def encode(self, x):
        return x @ self.weight

    def forward(self, x):
        return self.encode(x)


class Scaled(Coder):
    """A user's subclass that leaves `encode` alone."""

    def forward(self, x):
        return 2 * self.encode(x)


class Own(Coder):
    def encode(self, x):
        return -x


class Fast(_swap.Swapped):
    def encode(self, x):
        return super().encode(x) + (1000 if self._fusae_correct else 2000)


def _why_not(module):
    return "it is wide" if module.weight.shape[0] > 100 else None


@pytest.fixture(autouse=True)
def tool(monkeypatch):
    adapter = _swap.Adapter(Coder, Fast, ("encode",), _why_not, ("adds a thousand",))
    monkeypatch.setitem(sys.modules, "made_up_tool", types.ModuleType("made_up_tool"))
    monkeypatch.setitem(_swap.TOOLS, "made_up_tool", "made_up")
    module = types.ModuleType("fusae.integrations.made_up")
    module.ADAPTERS = (adapter,)
    monkeypatch.setitem(sys.modules, "fusae.integrations.made_up", module)


X = torch.ones(1, 4)


def test_the_same_object_and_back():
    coder = Coder()
    weight, keys = coder.weight, list(coder.__dict__)
    assert fusae.accelerate(coder) is coder
    assert coder(X)[0, 0] == 1001 and coder.weight is weight and list(coder.__dict__) == keys
    assert isinstance(coder, Coder) and type(coder).__name__ == "Coder"
    assert fusae.restore(coder) is coder
    assert type(coder) is Coder and coder(X)[0, 0] == 1


def test_twice_is_once_and_the_last_word_on_gradients_counts():
    coder = fusae.accelerate(fusae.accelerate(Coder()), gradients="tool")
    assert coder(X)[0, 0] == 2001
    assert type(fusae.restore(coder)) is Coder


def test_inside_a_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"a": Coder(), "b": Own()}))
    fusae.accelerate(model)
    assert model[1]["a"](X)[0, 0] == 1001 and type(model[1]["b"]) is Own
    assert fusae.explain(model).splitlines() == [
        "1.a: Coder on fusae: encode (gradients 'correct')",
        "    unlike the tool: adds a thousand",
        "1.b: Own left as it is: Own overrides encode",
    ]


class Trainer:
    """Not a module itself."""

    def __init__(self):
        self.ae, self.step = Coder(), 0
        self.more, self.again = {"a": Coder(), "b": 1}, [self.ae, Own()]


def test_a_list_or_dict_of_dictionaries():
    coders = fusae.accelerate({3: Coder(), 7: [Coder()]})
    assert fusae.explain(coders).splitlines()[0] == "3: Coder on fusae: encode (gradients 'correct')"
    assert coders[3](X)[0, 0] == 1001 and type(coders[7][0]) is Coder  # what is deeper is left
    assert type(fusae.restore(coders)[3]) is Coder
    pair = fusae.accelerate([Coder(), nn.Sequential(Coder())], gradients="tool")
    assert [line.split(":")[0] for line in fusae.explain(pair).splitlines()] == ["0", "1.0"]
    with pytest.raises(SwapError, match="list is or holds no dictionary"):
        fusae.accelerate([])


def test_what_a_trainer_holds():
    trainer = fusae.accelerate(Trainer())
    assert trainer.ae(X)[0, 0] == trainer.more["a"](X)[0, 0] == 1001
    assert fusae.explain(trainer).splitlines() == [
        "ae: Coder on fusae: encode (gradients 'correct')",
        "    unlike the tool: adds a thousand",
        "more.a: Coder on fusae: encode (gradients 'correct')",
        "    unlike the tool: adds a thousand",
        "again.1: Own left as it is: Own overrides encode",
    ]
    assert type(fusae.restore(trainer).more["a"]) is Coder


def test_a_class_makes_accelerated_objects_of_the_class():
    Fast = fusae.accelerate(Coder, gradients="tool")
    coder = Fast(width=4)
    assert issubclass(Fast, Coder) and Fast.__name__ == "Coder" and not isinstance(coder, Fast)
    assert coder(X)[0, 0] == 2001 and type(fusae.restore(coder)) is Coder
    assert type(pickle.loads(pickle.dumps(Fast()))) is Coder
    assert Coder()(X)[0, 0] == 1
    with pytest.raises(SwapError, match="Linear is no dictionary or trainer of a supported tool"):
        fusae.accelerate(nn.Linear)


def test_a_users_subclass_keeps_its_methods():
    coder = fusae.accelerate(Scaled())
    assert coder(X)[0, 0] == 2002 and type(fusae.restore(coder)) is Scaled


def test_copies_are_accelerated_and_pickles_are_the_tools():
    coder = fusae.accelerate(Coder())
    for other in (copy.deepcopy(coder), copy.copy(coder)):
        assert type(other) is type(coder) and other(X)[0, 0] == 1001
    assert copy.deepcopy(coder).weight is not coder.weight
    assert type(pickle.loads(pickle.dumps(coder))) is Coder
    file = io.BytesIO()
    torch.save(coder, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=False)) is Coder
    assert coder(X)[0, 0] == 1001


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Linear(2, 2), "Linear is or holds no dictionary of a supported tool"),
        (Own(), "Own left as it is: Own overrides encode"),
        (Coder(101), "Coder left as it is: it is wide"),
    ],
)
def test_nothing_to_accelerate_says_why(model, message):
    with pytest.raises(SwapError, match=message):
        fusae.accelerate(model)


def test_an_unknown_kind_of_gradients():
    with pytest.raises(ValueError, match="gradients must be one of 'correct', 'tool', got 'fast'"):
        fusae.accelerate(Coder(), gradients="fast")


def test_explain_before_and_after():
    coder = Coder()
    assert fusae.explain(coder) == "(model): Coder can run on fusae"
    fusae.accelerate(coder, gradients="tool")
    assert fusae.explain(coder) == "(model): Coder on fusae: encode (gradients 'tool')"


def test_no_tool_is_imported():
    tools = [name for name in _swap.TOOLS if name != "made_up_tool"]
    import subprocess

    code = f"import sys, fusae; assert not set({tools!r}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

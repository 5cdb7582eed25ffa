# SPDX-License-Identifier: Apache-2.0
"""Checks of `adam_rows_`."""

from __future__ import annotations

import torch

from .. import oracles
from ..cases import Case, Inputs
from ..compare import assert_equal, assert_grads

ADAM_STATE = ("param", "exp_avg", "exp_avg_sq")


def adam_forward(case: Case, inputs: Inputs, result: Inputs) -> None:
    truth = oracles.adam_rows(inputs)
    wanted = {**inputs, **{name: inputs[name].clone() for name in ADAM_STATE}}
    case.call(wanted, backend="reference")
    for name in ADAM_STATE:
        assert_grads(result[name], wanted[name], truth[name], name)
    if inputs["masked"]:
        untouched = torch.ones(len(inputs["param"]), dtype=torch.bool, device=inputs["param"].device)
        untouched[inputs["grad"].coalesce().indices()[0]] = False
        for name in ADAM_STATE:
            assert_equal(result[name][untouched], inputs[name][untouched], f"untouched rows of {name}")

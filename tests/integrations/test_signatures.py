# SPDX-License-Identifier: Apache-2.0
"""Every swapped method takes the arguments that the tool's own takes, by place and by name."""

import inspect

import pytest
from test_docs import adapters

from fusae.integrations._swap import TOOLS


@pytest.mark.parametrize("package", TOOLS)
def test_arguments_by_place_and_by_name(package):
    pytest.importorskip(package, reason=f"{package} is not installed (the extra [integrations])")
    for adapter in adapters(package):
        for name in adapter.swapped:
            if not hasattr(adapter.mixin, name):
                continue  # the tool's own, which calls methods that are swapped
            tools = list(inspect.signature(getattr(adapter.tool_class, name)).parameters.values())
            ours = inspect.signature(getattr(adapter.mixin, name))
            given = {p.name: None for p in tools if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
            what = f"{adapter.tool_class.__name__}.{name}{ours}"
            assert ours.bind(**given), what
            by_place = [p.name for p in tools if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
            bound = ours.bind(*by_place).arguments
            for argument, value in bound.items():
                if ours.parameters[argument].kind is not inspect.Parameter.VAR_POSITIONAL:
                    assert argument == value, what

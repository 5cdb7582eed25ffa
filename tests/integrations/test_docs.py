# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/integrations.md are those of the adapters. ``python test_docs.py`` prints them."""

import importlib
from pathlib import Path

import pytest

from fusae.integrations import _swap

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
# Modules that tools import when they are needed, and that have adapters.
LATER = {
    "circuit_tracer": (
        "replacement_model.replacement_model_transformerlens",
        "replacement_model.replacement_model_nnsight",
        "attribution.context_transformerlens",
        "attribution.context_nnsight",
    ),
}


def adapters(tool):
    for name in LATER.get(tool, ()):
        importlib.import_module(f"{tool}.{name}")
    return importlib.import_module(f"fusae.integrations.{_swap.TOOLS[tool]}").ADAPTERS


def table(tool):
    """Markdown rows: classes with the same methods stand together."""
    classes = {}
    for adapter in adapters(tool):
        if adapter.swapped:
            classes.setdefault(adapter.swapped, []).append(f"`{adapter.tool_class.__name__}`")
    rows = [f"| {', '.join(dict.fromkeys(names))} | {', '.join(methods)} |" for methods, names in classes.items()]
    return "\n".join(["| class | methods |", "|---|---|", *rows])


@pytest.mark.parametrize("tool", _swap.TOOLS)
def test_the_page_names_what_is_swapped(tool):
    pytest.importorskip(tool, reason=f"{tool} is not installed (see docs/integrations.md)")
    page = PAGE.read_text(encoding="utf-8")
    assert table(tool) in page, f"docs/integrations.md wants for {tool}:\n{table(tool)}"
    for adapter in adapters(tool):
        assert adapter.tool_class.__name__ in page
        for difference in adapter.differences:
            assert difference in " ".join(page.split()), difference


if __name__ == "__main__":
    for tool in _swap.TOOLS:
        if importlib.util.find_spec(tool):
            importlib.import_module(tool)
            print(f"{tool}\n\n{table(tool)}\n")

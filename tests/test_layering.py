# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, read from the sources. The table is in the design; a new layer is a new line here."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "fusae"
SOURCES = {".py", ".h", ".cpp", ".cu", ".cuh"}

# What a module may import from the package; the first matching line counts. "." in the name of a rule is a folder.
PUBLIC = ("fusae", "fusae.ops", "fusae.codes", "fusae.info")
TOOLS = (
    *PUBLIC,
    "fusae._fields",
    "fusae._checks",
    "fusae._pages",
    "fusae.formats",
    "fusae.data",
    "fusae.nn",
    "fusae.optim",
    "fusae.train",
    "fusae.eval",
)
RULES = [
    ("reference/", ("fusae.reference",)),
    ("_vmap.py", ()),
    ("_dispatch.py", ("fusae._vmap",)),
    ("codes.py", ("fusae.ops",)),  # `from_dense` is a front of the op
    ("_fields.py", ()),
    ("_pages.py", ()),
    ("_checks.py", ("fusae.codes", "fusae._fields")),
    ("ops/__init__.py", ("fusae.ops",)),
    ("ops/", ("fusae._dispatch", "fusae._checks", "fusae.codes", "fusae.ops._once")),
    ("backends/__init__.py", ()),
    ("backends/reference.py", ("fusae.reference",)),
    ("backends/cpu/", ("fusae._C", "fusae.backends.cpu")),
    ("backends/triton/", ("fusae.kernels", "fusae.backends.triton")),
    ("backends/cuda/", ("fusae._cuda", "fusae.backends.cuda")),
    ("__init__.py", ("fusae._dispatch", "fusae.formats", "fusae.hooks", "fusae.integrations", *PUBLIC)),
    ("info.py", ("fusae._dispatch", "fusae.backends", "fusae.integrations")),
    ("nn/", TOOLS),
    ("optim/", TOOLS),
    ("train/", TOOLS),
    ("data/", TOOLS),
    ("eval/", TOOLS),
    ("formats/", TOOLS),
    ("hooks/", (*TOOLS, "fusae.hooks")),
    ("integrations/", (*TOOLS, "fusae.integrations")),
    ("testing/", (*TOOLS, "fusae.testing", "fusae._dispatch", "fusae.reference", "fusae.backends")),
    ("pipeline/", (*TOOLS, "fusae.pipeline")),
    ("plan/", (*TOOLS, "fusae.pipeline", "fusae.plan")),
    ("demo/", (*TOOLS, "fusae.pipeline", "fusae.demo", "fusae.testing")),
    ("bench/", (*PUBLIC, "fusae.testing", "fusae.bench")),
    ("cli.py", (*TOOLS, "fusae.bench", "fusae.pipeline", "fusae.plan", "fusae.demo", "fusae.cli")),
    ("__main__.py", ("fusae.cli", "fusae.info")),
]
ENVIRONMENT = {"FUSAE_BACKEND", "FUSAE_CPU_ISA", "FUSAE_AUTOTUNE"}
BUILD_OPTIONS = {"FUSAE_CUDA"}  # of CMake; messages name them


def _imports(path: Path, package: tuple[str, ...]) -> list[str]:
    """Absolute names of everything that a module imports, anywhere in it. `package`: where relative imports start."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            # `from package import name` may name a module: report it with the name then.
            found += [f"{module}.{a.name}" if _is_module(f"{module}.{a.name}") else module for a in node.names]
    return found


def _is_module(name: str) -> bool:
    if not name.startswith("fusae."):
        return False
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return path.with_suffix(".py").exists() or path.is_dir() or name in ("fusae._C", "fusae._cuda", "fusae.kernels")


def _rule(relative: str) -> tuple[str, ...]:
    for prefix, allowed in RULES:
        if relative == prefix or (prefix.endswith("/") and relative.startswith(prefix)):
            return allowed
    raise AssertionError(f"python/fusae/{relative} belongs to no layer: add a line to RULES")


MODULES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("relative", MODULES)
def test_a_module_imports_only_what_its_layer_may(relative):
    allowed = _rule(relative)
    package = ("fusae", *Path(relative).parent.parts)
    for name in _imports(PACKAGE / relative, package):
        if name.split(".")[0] == "fusae":
            assert any(name == a or (a != "fusae" and name.startswith(f"{a}.")) for a in allowed), (
                f"{relative} imports {name}; its layer may import {allowed}"
            )
        assert name.split(".")[0] not in ("triton", "tests", "benchmarks", "examples"), f"{relative} imports {name}"


def test_the_rules_reject_what_they_should(tmp_path):
    """The check itself: relative and absolute forms of forbidden imports are seen."""
    bad = tmp_path / "bad.py"
    bad.write_text(
        "from .. import reference\nfrom ..backends import cpu\nimport fusae._C\n"
        "def f():\n    from fusae import _dispatch\n"
        "from .decode import decode\nfrom ..codes import SparseCodes\n"
    )
    wanted = ["fusae.reference", "fusae.backends.cpu", "fusae._C", "fusae._dispatch", "fusae.ops.decode", "fusae.codes"]
    assert sorted(_imports(bad, ("fusae", "ops"))) == sorted(wanted)


def test_kernels_know_torch_and_triton_only():
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level > 1), f"{path.name} reaches outside kernels/"
        for name in _imports(path, ("kernels",)):
            assert name.split(".")[0] not in ("fusae", "tests", "benchmarks"), f"{path.name} imports {name}"


def test_environment_variables():
    """Three at most, read in Python only."""
    names = set()
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        names |= set(re.findall(r"FUSAE_[A-Z_]+", path.read_text()))
    assert names <= ENVIRONMENT | BUILD_OPTIONS
    for path in (ROOT / "csrc").rglob("*"):
        assert path.suffix not in SOURCES or "getenv" not in path.read_text(), f"{path} reads the environment"


# --- native sources -------------------------------------------------------------------------------------------------

CSRC = ROOT / "csrc"
NATIVE = sorted(p.relative_to(CSRC).as_posix() for p in CSRC.rglob("*") if p.suffix in SOURCES)
# Headers whose templates emit no code. Any other template of the standard library, compiled with the flags of one
# instruction set, could be the copy that the linker keeps for the whole module.
PLAIN = {"cstdint", "cstddef", "cstdlib", "cstring", "type_traits", "new", "immintrin.h"}
FOREIGN = re.compile(r"torch|ATen|c10|pybind11|Python\.h|cuda|cub/|omp\.h")


def _includes(relative: str) -> list[tuple[str, str]]:
    """(kind, name) of every include: kind is ``<`` or ``"``."""
    return re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', (CSRC / relative).read_text(), re.M)


@pytest.mark.parametrize("relative", NATIVE)
def test_native_includes(relative):
    layer = relative.split("/")[0]
    for kind, name in _includes(relative):
        where = f"{relative} includes {name}"
        own = name.split("/")[0] if kind == '"' else None
        foreign = kind == "<" and FOREIGN.search(name)
        if layer == "include":
            assert own in (None, "fusae") and not foreign, where
        elif layer == "cpu":
            assert own in (None, "fusae", "cpu") and not foreign, where
        elif layer == "cuda":
            assert own != "cpu" and not re.search(r"torch|ATen|c10|pybind11", name), where
        elif layer == "bindings":
            assert own in (None, "fusae") and not re.search(r"torch|ATen|c10", name), where
        else:
            raise AssertionError(f"csrc/{relative} belongs to no layer")


def test_instruction_set_units_use_no_standard_templates():
    """Everything that an isa_*.cpp sees, through any number of includes."""
    units = [name for name in NATIVE if re.fullmatch(r"cpu/isa_\w+\.cpp", name)]
    assert len(units) >= 3
    seen, todo = set(), list(units)
    while todo:
        here = todo.pop()
        seen.add(here)
        for kind, name in _includes(here):
            if kind == "<":
                assert name in PLAIN, f"{here} includes <{name}>, which ends up in code for one instruction set only"
            else:
                target = f"include/{name}" if name.startswith("fusae/") else name
                todo += [target] if target not in seen else []
    assert {f for f in NATIVE if f.endswith("-inl.h")} <= seen, (
        "every algorithm body is compiled for every instruction set"
    )


def test_openmp_is_known_to_one_file():
    for relative in NATIVE:
        if relative != "cpu/parallel.h":
            assert not re.search(r"#\s*pragma\s+omp|\bomp_\w+\(", (CSRC / relative).read_text()), relative


# --- all sources ----------------------------------------------------------------------------------------------------


def _tracked() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [p for name in listing.stdout.split("\0") if name and (p := ROOT / name).suffix in SOURCES and p.exists()]


def test_every_source_file_names_its_licence():
    missing = [p for p in _tracked() if "SPDX-License-Identifier: Apache-2.0" not in p.read_text()[:200]]
    assert not missing


def test_no_file_is_too_long():
    long = {
        str(p.relative_to(ROOT)): n
        for p in _tracked()
        if (n := len(p.read_text().splitlines())) > 450 + 200 * (p.suffix != ".py")
    }
    assert not long

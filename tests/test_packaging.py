# SPDX-License-Identifier: Apache-2.0
"""The installed package: what it needs to import, what the sdist and the wheel hold, what the binary links to."""

import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import fusae
from fusae.testing import left_out

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "fusae"


def _python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120, cwd="/")


# --- import ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocked", ["triton", "fusae._C", "fusae._cuda", "fusae.kernels"])
def test_import_and_run_without(blocked):
    """Nothing optional is needed: the ops run, and the table says why a backend is missing."""
    result = _python(
        f"import sys; sys.modules[{blocked!r}] = None\n"
        "import torch, fusae\n"
        "from fusae.info import report\n"
        "codes = fusae.encode_topk(torch.randn(3, 8), torch.randn(20, 8), None, 4)\n"
        "assert fusae.decode(codes, torch.randn(20, 8)).shape == (3, 8)\n"
        "print(report())"
    )
    assert result.returncode == 0, result.stderr
    if blocked == "fusae._C":
        assert "the native module is missing" in result.stdout


def test_a_missing_native_module_is_a_reason_not_a_fallback():
    result = _python(
        "import sys; sys.modules['fusae._C'] = None\n"
        "import torch, fusae\n"
        "try:\n"
        "    fusae.topk(torch.randn(3, 8), 2, backend='cpu')\n"
        "except fusae.BackendError as error:\n"
        "    print(error)\n"
    )
    assert "backend 'cpu' was asked for but cannot run topk_fwd: the native module is missing (" in result.stdout, (
        result
    )


def test_import_is_light():
    """``import fusae`` brings torch and nothing that only the demo, the report or the tests need."""
    result = _python("import fusae, sys; print(*sorted({name.split('.')[0] for name in sys.modules}))")
    assert result.returncode == 0, result.stderr
    heavy = {"triton", "transformers", "matplotlib", "jinja2", "typer", "hypothesis", "pytest"}
    without_fusae = _python("import torch, sys; print(*sorted({name.split('.')[0] for name in sys.modules}))")
    assert not heavy & (set(result.stdout.split()) - set(without_fusae.stdout.split()))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see which libraries are loaded")
def test_one_openmp_runtime():
    """Two of them in a process fight over the cores: `_C` has to use torch's."""
    result = _python(
        "import fusae, torch\n"
        "fusae.topk(torch.randn(300, 80), 2)\n"
        "names = {line.split()[-1] for line in open('/proc/self/maps')}\n"
        "print(*[name for name in names if 'gomp' in name or 'iomp' in name or 'libomp' in name])"
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) <= 1, result.stdout


def test_version():
    assert fusae.__version__ == fusae.info.versions()["fusae"]
    assert f'version = "{fusae.__version__}"' in (ROOT / "pyproject.toml").read_text()


# --- sources --------------------------------------------------------------------------------------------------------


def test_kernels_is_no_package_of_its_own():
    """It is installed as fusae.kernels; a top-level package called kernels would shadow another one."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert importlib.util.find_spec("kernels") is None or "fusae" not in str(importlib.util.find_spec("kernels").origin)


# --- sdist and wheel ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An sdist of this tree and a wheel built from it, without network and with no torch at build time."""
    if importlib.util.find_spec("scikit_build_core") is None or importlib.util.find_spec("pybind11") is None:
        pytest.skip("scikit-build-core and pybind11 are not installed here: no wheel can be built")
    out = tmp_path_factory.mktemp("dist")

    def run(*command, cwd):
        result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]

    run(sys.executable, "-c", f"from scikit_build_core.build import build_sdist; build_sdist({str(out)!r})", cwd=ROOT)
    (sdist,) = out.glob("*.tar.gz")
    run(
        sys.executable, "-m", "pip", "wheel", str(sdist), "--no-deps", "--no-build-isolation", "--no-index", "-q",
        "-w", str(out), cwd=out,
    )  # fmt: skip
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def _modules() -> set[str]:
    """Every file of the package that has to be installed, by its path in the wheel."""
    found = {p.relative_to(PACKAGE.parent).as_posix() for p in PACKAGE.rglob("*") if p.is_file()}
    found |= {f"fusae/kernels/{p.relative_to(ROOT / 'kernels').as_posix()}" for p in (ROOT / "kernels").rglob("*.py")}
    return {name for name in found if "__pycache__" not in name and not name.endswith((".pyc", ".so", ".md"))}


def test_wheel(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
        metadata = Parser().parsestr(wheel.read(next(n for n in names if n.endswith("METADATA"))).decode())
        binary = wheel.read(next(n for n in names if n.startswith("fusae/_C.")))
    package = {name for name in names if name.startswith("fusae/")}
    native = {name for name in package if name.startswith(("fusae/_C.", "fusae/_cuda."))}
    assert _modules() == package - native
    info = f"fusae-{fusae.__version__}.dist-info/"
    assert all(name.startswith(info) for name in names - package), names - package
    assert any("LICENSE" in name for name in names) and info + "entry_points.txt" in names
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.10"
    required = {r.split(">")[0].strip() for r in metadata.get_all("Requires-Dist") if "extra ==" not in r}
    assert "torch" in required and not required & {"triton", "transformers", "matplotlib", "jinja2", "pytest"}
    # One wheel for every version of torch: nothing in the binary names its libraries.
    assert b"libtorch" not in binary and b"libc10" not in binary and b"libpython" not in binary


def test_sdist(built):
    with tarfile.open(built[0]) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    for wanted in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "PKG-INFO", "tests/test_packaging.py"):
        assert wanted in names
    assert {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()} <= names
    assert {f"python/{name}" for name in _modules() if not name.startswith("fusae/kernels/")} <= names
    junk = (
        "build/",
        "dist/",
        "runs/",
        ".venv/",
        ".git/",
        ".ci/",
        ".pytest_cache/",
        ".hypothesis/",
        "benchmarks/results/",
    )
    assert not [n for n in names if n.startswith(junk) or "__pycache__" in n or n.endswith((".so", ".pyc"))]


def test_what_is_left_out_here_has_reasons():
    """The missing CUDA and Triton backends of this machine are named in the report, each with a reason."""
    table = fusae.info.report()
    for reason in left_out().values():
        assert reason in table

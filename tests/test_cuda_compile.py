# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend compiled for GPUs that need not be there: without warnings, hot kernels without spills, a module
that imports where there is no driver."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: and the bytes that any kernel may spill there: Hopper is what they are written for
ARCHITECTURES = {"sm_80": 64, "sm_90a": 0, "sm_100": 16}
#: Kernels that may keep a little in local memory, by a part of their (mangled) names, and the most bytes they may
#: spill. Group-max holds the best of each group; the repair is for rows whose certificate failed; the portable encoders
#: are what other GPUs than Hopper run, spills and all: to be looked at first where one of them is at hand.
NOT_HOT = {"GroupMax": 800, "repair": 600, "merge": 200, "portable": 300, "_rows": 200, "scan": 600}

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
    pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the module, and what the compilers said."""
    import pybind11

    folder = tmp_path_factory.mktemp("cuda")
    options = ["-DFUSAE_CUDA=ON", "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CUDA_FLAGS=-Werror=all-warnings",
               f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]  # fmt: skip
    said = ""
    for command in (["cmake", "-S", str(ROOT), "-B", str(folder), *options],
                    ["cmake", "--build", str(folder), "--target", "_cuda", "--parallel", "2"]):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=2400)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        said += done.stdout + done.stderr
    return folder, said


def spills(said: str) -> dict[tuple[str, str], int]:
    """Bytes that every kernel stores outside its registers, by (name, architecture), from the words of ``ptxas -v``."""
    found = re.finditer(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores", said, re.S
    )
    return {(name, arch): int(stores) for name, arch, _, stores in (match.groups() for match in found)}


def allowed(name: str) -> int:
    return max((most for part, most in NOT_HOT.items() if part in name), default=0)


def test_hot_kernels_spill_nothing(built):
    found = {key: stores for key, stores in spills(built[1]).items() if "3cub" not in key[0]}  # CUB's own are not ours
    for arch in ARCHITECTURES:
        assert sum(where == arch for _, where in found) > 30, f"hardly any kernel of {arch}"
    bad = {key: stores for key, stores in found.items() if stores > max(allowed(key[0]), ARCHITECTURES[key[1]])}
    assert not bad, bad


def test_no_warning(built):
    assert not re.search(r"\bwarning\b", built[1], re.I), built[1][-4000:]


def test_it_imports_without_a_driver(built):
    """And says so when it is to run."""
    module = next(built[0].glob("_cuda*.so"))
    assert module.stat().st_size > 2**20
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_cuda', {str(module)!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(sorted(name for name in dir(module) if not name.startswith('_')))\n"
    )
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "decode" in done.stdout and "topk" in done.stdout
    needs = subprocess.run(["ldd", str(module)], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"libcuda|libcudart|libtorch", needs), needs


def test_spills_are_read_from_what_ptxas_says():
    said = (
        "ptxas info    : Compiling entry function '_Z3hotv' for 'sm_90a'\n"
        "ptxas info    : Function properties for _Z3hotv\n"
        "    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\n"
    )
    assert spills(said) == {("_Z3hotv", "sm_90a"): 12} and allowed("_Z3hotv") == 0

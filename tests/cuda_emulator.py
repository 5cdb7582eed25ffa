# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on the CPU: their sources, compiled by the host's compiler against csrc/cuda/emulated."""

import contextlib
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fusae import _dispatch
from fusae.backends.cuda import native

ROOT = Path(__file__).resolve().parent.parent
NAME = "_cuda_emulated"
FLAGS = ["-x", "c++", "-std=c++17", "-O1", "-fPIC", "-U_FORTIFY_SOURCE", "-fvisibility=hidden", "-ffp-contract=off",
         "-Wno-unknown-pragmas"]  # fmt: skip


def missing() -> str | None:
    """Why the emulator cannot be built here, or None."""
    if shutil.which("g++") is None:
        return "the emulated CUDA kernels are compiled by g++"
    if importlib.util.find_spec("pybind11") is None:
        return "the emulated CUDA kernels need pybind11's headers"
    return None


def compile_file(source: Path, target: Path) -> None:
    import pybind11

    folders = [ROOT / "csrc/cuda/emulated", ROOT / "csrc", ROOT / "csrc/include", Path(pybind11.get_include()),
               Path(sysconfig.get_paths()["include"])]  # fmt: skip
    include = [f"-I{folder}" for folder in folders]
    command = ["g++", *FLAGS, "-include", "cuda_runtime.h", f"-DFUSAE_CUDA_MODULE={NAME}", *include]
    done = subprocess.run([*command, "-c", str(source), "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, f"{source.name}: {done.stderr[-3000:]}"


@functools.cache
def emulated():
    """The native module. Built once for every state of the sources; several processes may ask for it at a time."""
    sources = sorted([*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/bindings/cuda_*.cpp")])
    seen = [*sources, *ROOT.glob("csrc/cuda/**/*.*h"), *ROOT.glob("csrc/include/**/*.h"), Path(__file__)]
    state = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(seen))).hexdigest()[:16]
    module = ROOT / "build" / "cuda-emulated" / state / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not module.exists():
        parts = module.parent / f"parts-{os.getpid()}"
        parts.mkdir(parents=True)
        objects = [parts / f"{source.name}.o" for source in sources]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compile_file, sources, objects))
        linked = parts / module.name
        subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(linked)], check=True)
        linked.replace(module)
        shutil.rmtree(parts)
    spec = importlib.util.spec_from_file_location(NAME, module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@contextlib.contextmanager
def emulation():
    """The backend "cuda" runs the emulated kernels on CPU tensors in a ``with`` block, when asked for by name."""
    before = _dispatch._backends.pop("cuda", None)
    try:
        with native.use(emulated()):
            yield
    finally:
        _dispatch._backends.pop("cuda", None)
        if before is not None:
            _dispatch._backends["cuda"] = before

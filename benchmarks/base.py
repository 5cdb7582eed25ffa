# SPDX-License-Identifier: Apache-2.0
"""Another commit of fusae, built in a temporary folder, and its calls in a process of their own.

The process times its calls itself; `interleaved` takes its seconds. Contender and inputs come from that commit's
`fusae.testing.workloads`, which makes the same inputs of the same seeds.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

_CHILD = """
import json, sys, time
site, spec = sys.argv[1], json.loads(sys.argv[2])
# An editable install of this environment would win over the path.
sys.meta_path[:] = [f for f in sys.meta_path if "Editable" not in type(f).__name__ and "Scikit" not in type(f).__name__]
sys.path.insert(0, site)
import torch
torch.set_num_threads(spec.pop("threads"))
import fusae
assert fusae.__file__.startswith(site), f"{fusae.__file__} is not the commit that was built in {site}"
from fusae.testing import workloads
op, name, backend = spec.pop("op"), spec.pop("name"), spec.pop("backend")
if name not in workloads.CONTENDERS.get(op, {}):
    print(json.dumps({"error": f"that commit has no contender {name!r} of the benchmark {op}"}), flush=True)
    sys.exit()
call = workloads.CONTENDERS[op][name](workloads.make_inputs(**spec), spec["k"], backend)
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
"""


class BaseError(ValueError):
    """A commit that cannot be found, built or asked. The message says why."""


def _run(command: list[str], what: str, **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise BaseError(f"{what} failed:\n{(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout.strip()


def commit_of(rev: str) -> str:
    return _run(["git", "-C", str(ROOT), "rev-parse", "--verify", f"{rev}^{{commit}}"], f"finding the commit {rev!r}")


@contextlib.contextmanager
def built(rev: str) -> Iterator[tuple[str, Path]]:
    """(commit, folder to import fusae from) of a revision; worktree and build are gone afterwards."""
    commit = commit_of(rev)
    with tempfile.TemporaryDirectory(prefix="fusae-base-") as folder:
        tree, site = Path(folder) / "tree", Path(folder) / "site"
        _run(["git", "-C", str(ROOT), "worktree", "add", "--detach", str(tree), commit], f"a worktree of {rev}")
        try:
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
            _run([*pip, "--target", str(site), str(tree)], f"building {rev}")
            yield commit, site.resolve()
        finally:
            _run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], "removing the worktree")


class Remote:
    """A contender of another build, in its own process; a call takes a turn there, `seconds` is what it took."""

    def __init__(self, site: Path, spec: dict[str, Any]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(site), "OMP_WAIT_POLICY": "passive"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(site), json.dumps(spec)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=site,
        )  # fmt: skip
        self.seconds = 0.0
        answer = self._answer()
        if "error" in answer:
            self.close()
            raise BaseError(answer["error"])

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise BaseError(f"the other commit's process ended:\n{self._process.stderr.read().strip()[-2000:]}")
        return json.loads(line)

    def __call__(self) -> None:
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self.seconds = self._answer()["seconds"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()
        self._process.stderr.close()

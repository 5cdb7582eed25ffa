# SPDX-License-Identifier: Apache-2.0
"""The list of what is compiled ahead of time, without compiling it (tests/test_triton_compile.py does)."""

import importlib

import pytest

pytest.importorskip("triton", reason="the kernels need triton")

from fusae.kernels import aot


def test_every_job_says_what_each_argument_of_its_kernel_is():
    open_ends = {}
    for job in aot.jobs():
        kernel = getattr(importlib.import_module(f"fusae.kernels.{job.module}"), job.kernel)
        known = job.constants.keys() | job.types.keys()
        if missing := set(kernel.arg_names) - known:
            open_ends[job.name] = missing
    assert not open_ends
    assert len({job.name for job in aot.jobs()}) == len(aot.jobs()) > 100

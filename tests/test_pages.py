# SPDX-License-Identifier: Apache-2.0
"""Large pages under large matrices, as the kernel counts them."""

import re
from pathlib import Path

import pytest
import torch

from fusae import _pages, nn, optim

SMAPS, SETTING = Path("/proc/self/smaps"), Path("/sys/kernel/mm/transparent_hugepage/enabled")
if not SMAPS.exists() or not SETTING.exists() or "[never]" in SETTING.read_text():
    pytest.skip("this system gives no large pages", allow_module_level=True)


def in_large_pages(tensor):
    """Share of the memory of a tensor, by the mappings it lies in."""
    start, stop, found = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, 0
    for low, high, size in re.findall(
        r"^([0-9a-f]+)-([0-9a-f]+) .*\n(?:\w+:.*\n)*?AnonHugePages: +(\d+) kB", SMAPS.read_text(), re.MULTILINE
    ):
        if int(low, 16) < stop and start < int(high, 16):
            found += 1024 * int(size)
    return found / tensor.nbytes


@pytest.mark.parametrize("touched", [False, True])
def test_a_large_tensor_lies_in_large_pages(touched):
    tensor = torch.zeros(2**24)
    if touched:
        tensor.fill_(1.0)
    kept = tensor.clone() if touched else None
    assert _pages.large_pages(tensor) is tensor
    tensor.add_(1.0)
    if in_large_pages(tensor) == 0.0 and touched:
        pytest.skip("this kernel does not make large pages of small ones (MADV_COLLAPSE)")
    assert in_large_pages(tensor) > 0.9
    assert kept is None or torch.equal(tensor, kept + 1)


def test_small_tensors_and_views_of_a_part_are_left():
    small = torch.zeros(2**10)
    assert torch.equal(_pages.large_pages(small), torch.zeros(2**10))
    whole = torch.arange(2**24, dtype=torch.float32)
    _pages.large_pages(whole[5:-7])  # whose ends share pages with others
    assert torch.equal(whole, torch.arange(2**24, dtype=torch.float32))


def test_coder_and_moments_lie_in_large_pages():
    coder = nn.SparseCoder(nn.SparseCoderConfig(d=64, m=2**18, k=4))
    optimizer = optim.Adam([coder.W_enc])
    state = optimizer.state_of(coder.W_enc)
    state["exp_avg"].fill_(0.5)
    assert in_large_pages(coder.W_enc) > 0.9 and in_large_pages(state["exp_avg"]) > 0.9

# SPDX-License-Identifier: Apache-2.0
"""Run by test_data_shards.py in a process of its own: collecting that is killed, or meets a full disk.

``kill PATH SEED``: children collect into PATH and are killed at random moments until one comes to its end; prints how
many were killed. ``full PATH BYTES``: collects while no file may grow beyond BYTES; prints the error.
"""

import os
import random
import resource
import signal
import sys
import time

import numpy as np
import torch

from fusae.data import TokenChunks, capture, collect

WIDTH, VOCABULARY, CTX = 24, 40, 12


class Slow(torch.nn.Module):
    """A module that takes as long as a small model. Rows differ for each token and position."""

    def __init__(self, seconds=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.place = torch.nn.Embedding(CTX, WIDTH)
        self.out = torch.nn.Identity()
        self.seconds = seconds

    def forward(self, ids, attention_mask=None):
        time.sleep(self.seconds)
        return self.out(self.embed(ids) + self.place.weight[: ids.shape[1]])


def chunks_of_many_lengths(count=160):
    random_of = np.random.default_rng(0)
    lengths = random_of.integers(1, CTX + 1, count).astype(np.int32)
    return TokenChunks(random_of.integers(0, VOCABULARY, (count, CTX)).astype(np.uint16), lengths, 0, (3,))


def collected(path, seconds=0.0, dtype="int8"):
    options = {"batch_size": 4, "dtype": dtype, "shard_rows": 100, "progress": False}
    return collect(Slow(seconds), chunks_of_many_lengths(), ["out", "embed"], path, **options)


def _kill(path, seed):
    moments, killed = random.Random(seed), 0
    while True:
        child = os.fork()
        if child == 0:
            collected(path, seconds=0.002)
            os._exit(0)
        # More time for later ones: on a busy machine none would come to its end.
        time.sleep(moments.uniform(0, 0.05 * 1.25**killed))
        os.kill(child, signal.SIGKILL)
        if os.WIFEXITED(os.waitpid(child, 0)[1]):
            return killed
        killed += 1


def _full(path, size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        collected(path)
    except OSError as error:
        return f"{type(error).__name__} {error}"


if __name__ == "__main__":
    torch.set_num_threads(1)  # a fork does not copy the threads of a pool
    capture._SAVE_EVERY_S = 0.005
    print({"kill": _kill, "full": _full}[sys.argv[1]](sys.argv[2], int(sys.argv[3])))

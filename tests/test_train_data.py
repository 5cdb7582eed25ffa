# SPDX-License-Identifier: Apache-2.0
"""What a trainer can train on, and what it says about data that it cannot."""

import json

import numpy as np
import pytest
import torch

from fusae.data import ActivationStream, collect
from fusae.train import Rows, TrainConfig, Trainer, open_data, train

D, M, K, B = 12, 50, 3, 32


def data(n=640, seed=0, dtype=torch.float32):
    """Sparse sums of random directions, off centre."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(M, D, generator=generator)
    chosen = torch.rand(n, M, generator=generator).topk(K, 1).indices
    return (directions[chosen].sum(1) + 5).to(dtype)


def config(**fields):
    return TrainConfig(**({"m": M, "k": K, "batch_size": B, "dead_window": 100, "log_every": 6} | fields))


def same_bits(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_float16_rows_on_disk_train_as_their_float32_values(tmp_path):
    x = data().half()
    np.save(tmp_path / "rows.npy", x.numpy())
    on_disk = train(config(), str(tmp_path / "rows.npy"), tmp_path / "run", show=False)
    assert same_bits(on_disk, train(config(), x.float(), show=False))
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert about["data"]["path"] == str(tmp_path / "rows.npy")


def collected(folder, dtype="float32"):
    """Activations of a model that is a table of 640 rows."""
    model = torch.nn.Sequential(torch.nn.Embedding(640, D))
    model[0].weight.data = data()
    chunks = np.arange(640).reshape(64, 10)
    options = {"skip_positions": 0, "outlier_factor": None, "dtype": dtype, "source": "a model", "progress": False}
    return collect(model, chunks, "0", folder, **options)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_folder_of_activations(tmp_path, dtype):
    folder = tmp_path / "activations"
    stored = collected(folder, dtype)
    coder = train(config(), folder, tmp_path / "run", show=False)
    assert same_bits(coder, train(config(), data().to(getattr(torch, dtype)).float(), show=False))
    said = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert said["path"] == str(folder) and said["model"] == "a model" and said["module"] == "0"
    assert said["rows"] == 640 and said["dropped"] == stored.dropped and said["storage"]["dtype"] == dtype
    assert said["sites"] == [{"module": "0", "side": "out", "width": D}]


def test_rows_straight_from_a_model(tmp_path):
    def source():
        model = torch.nn.Sequential(torch.nn.Embedding.from_pretrained(data()))
        chunks = np.arange(640).reshape(40, 16)
        return ActivationStream(model, chunks, "0", buffer_rows=128, skip_positions=0, source="a model")

    coder = train(config(tokens=1280), source(), tmp_path / "run", show=False)
    said = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert said["rows"] is None and said["d"] == D and said["model"] == "a model" and said["ctx"] == 16
    Trainer(config(tokens=1280), source(), tmp_path / "part", show=False).run(until=17)
    resumed = Trainer(None, source(), tmp_path / "part", resume=True, show=False).run()
    assert same_bits(coder, resumed)


class Endless:
    """The least a source must be: `shape`, and batches without a length."""

    shape = (640, D)

    class Batches:
        def __init__(self, x, size):
            self.x, self.size, self.at = x, size, 0

        def __iter__(self):
            return self

        def __next__(self):
            self.at += 1
            if self.at * self.size > len(self.x):
                raise StopIteration
            return self.x[(self.at - 1) * self.size : self.at * self.size]

        def state_dict(self):
            return {"at": self.at}

        def load_state_dict(self, state):
            self.at = state["at"]

    def batches(self, batch_size, seed, epochs):
        return self.Batches(data(), batch_size)


def test_any_object_with_batches_will_do():
    assert Trainer(config(tokens=320), Endless(), show=False).run().config.m == M
    with pytest.raises(ValueError, match="data: ended after step 20 of 40; take fewer tokens or more epochs"):
        Trainer(config(tokens=1280), Endless(), show=False).run()


def test_data_without_a_length_need_tokens():
    with pytest.raises(ValueError, match="tokens must be given: the data cannot tell how many rows they have"):
        Trainer(config(), Endless(), show=False)


def test_data_in_memory_and_on_disk_are_told_apart(tmp_path):
    Trainer(config(), data(), tmp_path / "run", show=False).run(until=3)
    with pytest.raises(ValueError, match="state: sha256 is"):
        Trainer(None, data(seed=1), tmp_path / "run", resume=True, show=False)


def poisoned(rows):
    x = data()
    x[rows, 3] = torch.nan
    return x


@pytest.mark.parametrize(
    "make, fields, error, message",
    [
        (lambda: torch.zeros(0, D), {}, ValueError, r"data must hold at least one row .* got shape \[0, 12\]"),
        (lambda: torch.zeros(5), {}, ValueError, r"data must have shape \[n, d\], one row per token, got \[5\]"),
        (lambda: torch.zeros(64, D, dtype=torch.int64), {}, TypeError, "must hold floating-point values, got torch"),
        (lambda: [[1.0]], {}, TypeError, "data must be a tensor or array .* got list"),
        (lambda: torch.ones(64, D), {}, ValueError, "the first 64 rows are all the same"),
        (lambda: data(20), {}, ValueError, "batch_size 32 exceeds the 20 rows"),
        (data, {"d": 13}, ValueError, "d must be the width of the data, 12, got 13"),
        (lambda: poisoned([3]), {}, ValueError, "1 of 32 rows hold NaN or infinite values"),
        (lambda: poisoned(slice(None)), {}, ValueError, r"step 1: 32 of 32 rows .* first is row 0 of the"),
        (lambda: "nowhere.npy", {}, FileNotFoundError, "data: nowhere.npy is not there"),
        (lambda: "/tmp", {}, ValueError, "holds no activations"),
        (lambda: __file__, {}, ValueError, "must be a .npy file"),
        (data, {"device": "tpu7"}, ValueError, "device must be 'auto', 'cpu', 'cuda'"),
    ],
)  # fmt: skip
def test_bad_data(make, fields, error, message, tmp_path):
    with pytest.raises(error, match=message):
        Trainer(config(**fields), make(), tmp_path / "run", show=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message is for machines without a GPU")
def test_missing_gpu():
    with pytest.raises(ValueError, match="device is 'cuda', but torch sees no GPU here"):
        Trainer(config(device="cuda"), data(), show=False)


def test_nan_after_the_first_batches_names_the_step(tmp_path):
    x = data()
    trainer = Trainer(config(init_rows=B, seed=3), x, tmp_path / "run", show=False)
    x[:] = torch.where(torch.arange(640)[:, None] % 64 == 0, torch.inf, x)
    with pytest.raises(ValueError, match=r"data: step \d+: \d+ of 32 rows hold NaN or infinite values"):
        trainer.run()
    assert trainer.step < 20


def test_npy_files(tmp_path):
    path = tmp_path / "rows.npy"
    np.save(path, data().numpy())
    assert open_data(path).shape == (640, D)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="rows.npy is truncated, damaged or no .npy file"):
        open_data(path)
    np.save(path, np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="rows.npy is truncated, damaged or no .npy file"):
        open_data(path)
    double = Rows(data(dtype=torch.float64)).take(slice(0, 2))
    assert double.dtype == torch.float64 and Rows(data(dtype=torch.bfloat16)).take(slice(0, 2)).dtype == torch.float32


def test_the_order_of_the_data_has_a_seed_of_its_own():
    one, same, other = (train(config(**fields), data(), show=False) for fields in (
        {"seed": 3}, {"seed": 3, "data_seed": 3}, {"seed": 3, "data_seed": 4}))  # fmt: skip
    assert same_bits(one, same) and not same_bits(one, other)


def test_rows_mixed_in_parts(tmp_path):
    x = data(6400)
    chosen = config(shuffle_rows=512, epochs=1)
    whole = train(chosen, x, show=False)
    assert not same_bits(whole, train(config(epochs=1), x, show=False))
    Trainer(chosen, x, tmp_path / "run", show=False).run(until=77)
    assert same_bits(whole, Trainer(None, x, tmp_path / "run", resume=True, show=False).run())
    with pytest.raises(ValueError, match="shuffle_rows must be at least 1, got 0"):
        config(shuffle_rows=0)

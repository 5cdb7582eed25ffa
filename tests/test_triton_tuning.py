# SPDX-License-Identifier: Apache-2.0
"""Tables of tiles, and how ``FUSAE_AUTOTUNE=1`` fills them. Times are made up: what is tested is what follows."""

import json
import threading

import pytest
import torch

from fusae import _dispatch
from fusae.testing import Target

if (REASON := _dispatch.why_not("encode_topk_fwd", "triton", static=True)) is not None:
    pytest.skip(f"triton: {REASON}", allow_module_level=True)

from fusae.kernels import autotune, tuning
from fusae.kernels.encode_plan import default_tiles
from triton.runtime.errors import OutOfResources

DEVICE = Target("triton").device
DEFAULT = default_tiles(torch.bfloat16, 4096, (9, 0))
OTHER = DEFAULT._replace(BN=128, stages=4)
PLACE = ("encode", "NVIDIA H200", torch.bfloat16, 4096)


@pytest.fixture(autouse=True)
def _nothing_measured_yet(monkeypatch):
    monkeypatch.setattr(tuning, "_measured", {})
    tuning.entry.cache_clear(), tuning._read.cache_clear()


def never():
    raise AssertionError("nothing was to be measured")


# --- tables ---------------------------------------------------------------------------------------------------------


def test_a_table_is_read_by_device_dtype_and_width(tmp_path):
    path = tuning.write("encode", "NVIDIA H200", torch.bfloat16, 3000, OTHER, tmp_path)
    assert path.name == "nvidia-h200.json"

    def found(name, dtype, d):
        return tuning.lookup("encode", name, dtype, d, DEFAULT, (tmp_path / "none", tmp_path))

    assert found("NVIDIA H200", torch.bfloat16, 4096) == OTHER
    assert found("NVIDIA H200", torch.bfloat16, 768) == DEFAULT
    assert found("NVIDIA H200", torch.float16, 4096) == DEFAULT
    assert found("NVIDIA A100", torch.bfloat16, 4096) == DEFAULT


def test_an_entry_is_added_to_those_that_are_there(tmp_path):
    tuning.write(*PLACE[:3], 768, OTHER, tmp_path)
    path = tuning.write(*PLACE, OTHER._replace(warps=4), tmp_path)
    assert sorted(json.loads(path.read_text())["encode"]) == ["bfloat16 d1024", "bfloat16 d4096"]
    assert [p.name for p in tmp_path.iterdir()] == ["nvidia-h200.json"]


def test_fields_that_are_left_out_are_the_heuristics(tmp_path):
    (tmp_path / "nvidia-h200.json").write_text('{"encode": {"bfloat16 d4096": {"BK": 32}}}')
    assert tuning.lookup(*PLACE, DEFAULT, (tmp_path,)) == DEFAULT._replace(BK=32)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"encode": {"bfloat16 d4096": {"BM": 100}}}', '{"encode": {"bfloat16 d4096": {"BM": "128"}}}',
     '{"encode": {"bfloat16 d4096": {"stages": 0}}}', '{"encode": {"bfloat16 d4096": {"wraps": 8}}}'],
)  # fmt: skip
def test_a_table_that_makes_no_sense_is_named(tmp_path, text):
    path = tmp_path / "nvidia-h200.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="nvidia-h200.json must be .* mend it, or delete it"):
        tuning.lookup(*PLACE, DEFAULT, (tmp_path,))


def test_every_shipped_table_is_readable():
    for path in tuning.SHIPPED.glob("*.json"):
        assert path.stem == tuning.slug(path.stem) and tuning._read(path)["encode"]


# --- measuring ------------------------------------------------------------------------------------------------------


def test_only_a_cache_makes_a_measurement(tmp_path):
    assert tuning.choose(*PLACE, DEFAULT, never, tmp_path, None) == DEFAULT


def test_what_is_measured_is_kept_and_not_measured_again(tmp_path, monkeypatch):
    shipped, cache, calls = tmp_path / "shipped", tmp_path / "cache", []

    def search():
        calls.append(1)
        return OTHER

    for _ in range(2):
        assert tuning.choose(*PLACE, DEFAULT, search, shipped, cache) == OTHER
    monkeypatch.setattr(tuning, "_measured", {})  # another process
    assert tuning.choose(*PLACE, DEFAULT, never, shipped, cache) == OTHER
    assert calls == [1] and (cache / "nvidia-h200.json").is_file() and not shipped.exists()


def test_a_shipped_table_is_not_measured_again_and_the_users_own_wins(tmp_path):
    shipped, cache = tmp_path / "shipped", tmp_path / "cache"
    tuning.write(*PLACE, OTHER, shipped)
    assert tuning.choose(*PLACE, DEFAULT, never, shipped, cache) == OTHER
    tuning.write(*PLACE, OTHER._replace(stages=2), cache)
    assert tuning.choose(*PLACE, DEFAULT, never, shipped, cache).stages == 2
    assert tuning.choose(*PLACE, DEFAULT, never, shipped, None).stages == OTHER.stages


def test_in_a_capture_nothing_is_measured_and_nothing_remembered(tmp_path):
    assert tuning.choose(*PLACE, DEFAULT, None, tmp_path, tmp_path) == DEFAULT
    assert tuning.choose(*PLACE, DEFAULT, lambda: OTHER, tmp_path, tmp_path) == OTHER
    assert tuning.choose(*PLACE, DEFAULT, None, tmp_path, tmp_path) == OTHER


def test_a_cache_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="not kept"):
        assert tuning.choose(*PLACE, DEFAULT, lambda: OTHER, tmp_path, tmp_path / "file" / "folder") == OTHER


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("capability", "shared"), [((8, 0), 163), ((8, 9), 99), ((9, 0), 227)])
def test_candidates_fit_a_block(dtype, capability, shared):
    default = default_tiles(dtype, 4096, capability)
    found = autotune.candidates(dtype, default, shared << 10)
    assert found[0] == default and len(set(found)) == len(found) > 3
    for t in found:
        assert t.stages * (t.BM + t.BN) * t.BK * dtype.itemsize <= shared << 10
        assert t.BM * t.BN <= autotune.ACCUMULATORS * 32 * t.warps and t.BN % t.parts == 0
        assert all(lo <= getattr(t, name) <= hi for name, (lo, hi) in tuning.FIELDS.items())


def test_the_fastest_wins_and_what_does_not_run_is_left_out():
    tiles = [DEFAULT, OTHER, OTHER._replace(warps=4), OTHER._replace(BK=32)]
    times = dict(zip(tiles, (3.0, 2.0, None, 2.5), strict=True))

    def timer(run):
        if run() is None:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return run()

    def prepare(candidate):
        return lambda: times[candidate]

    assert autotune.fastest(tiles, prepare, timer) == OTHER
    times[OTHER] = 2.97  # within the noise
    assert autotune.fastest(tiles[:2], prepare, timer) == DEFAULT
    times[DEFAULT] = None  # what is used without a measurement has to run
    with pytest.raises(OutOfResources):
        autotune.fastest(tiles, prepare, timer)


def test_the_gate_that_is_measured_finds_candidates(monkeypatch):
    """It really runs: every candidate's tiles, on rows and latents that are no multiples of them."""
    small = default_tiles(torch.float32, 40, None)
    tiles = [small, small._replace(BM=32, BN=256)]
    monkeypatch.setattr(autotune, "candidates", lambda dtype, default, shared: tiles)
    found, original = [], autotune.gate_of

    def watched(*args):
        prepare = original(*args)

        def kept(candidate):
            found.append([candidate])
            run = prepare(candidate)
            buffers = next(c.cell_contents for c in run.__closure__ if hasattr(c.cell_contents, "tally"))
            found[-1].append(buffers)
            return run

        return kept

    monkeypatch.setattr(autotune, "gate_of", watched)

    def timer(run):
        run(), run()
        return -float(len(found))

    assert autotune.search(DEVICE, torch.float32, 40, small, timer) == tiles[1]
    counts = [int(buffers.tally.view(-1, 8)[: autotune.ROWS, 0].sum()) for _, buffers in found]
    hits = autotune.ROWS * autotune.LATENTS * 0.5 * torch.special.erfc(torch.tensor(2.9 / 2**0.5)).item()
    assert counts[0] == counts[1] and 0.5 * hits < counts[0] < 1.7 * hits


def test_two_writers_leave_a_readable_table(tmp_path):
    threads = [threading.Thread(target=tuning.write, args=(*PLACE[:3], 2**i, OTHER, tmp_path)) for i in range(4, 8)]
    for thread in threads:
        thread.start(), thread.join()
    assert len(json.loads((tmp_path / "nvidia-h200.json").read_text())["encode"]) == 4

import gzip
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.errors import CalibrationError, OutFileBusy
from calibration.records import Appender, cells_done, finite, hold_folder, percentile, read_lines, spread


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentile_is_numpys(values, q):
    assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)), abs=1e-6)


def test_spread_of_nothing_is_nothing():
    assert spread([]) is None
    assert spread([2.0]) == {"mean": 2.0, "p50": 2.0, "p90": 2.0, "p95": 2.0, "p99": 2.0}


def test_nan_never_reaches_a_record():
    assert finite({"a": [math.nan, 1.0, {"b": math.inf}], "c": "nan"}) == {"a": [None, 1.0, {"b": None}], "c": "nan"}


def test_a_torn_last_line_is_cut_off_and_the_rest_kept(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}\n{"n": 3, "half')
    assert [r["n"] for r in read_lines(path)] == [1, 2]
    out = Appender(path)
    assert out.append({"n": 4}) is None
    assert out.close() == []
    assert [r["n"] for r in lines(path)] == [1, 2, 4]


def test_a_file_that_is_one_torn_line_is_emptied(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"n": ' + "1" * 70_000)
    out = Appender(path)
    out.append({"n": 1})
    assert lines(path) == [{"n": 1}]


def test_a_full_disk_leaves_no_half_line_and_loses_no_record(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spill"))
    (tmp_path / "spill").mkdir()
    path = tmp_path / "r.jsonl"
    out = Appender(path)
    assert out.append({"n": 0, "pad": "x" * 3000}) is None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the write stops in the middle of the line
        warning = out.append({"n": 1, "pad": "x" * 2000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert warning
    assert "1 record(s) kept in" in warning
    assert [r["n"] for r in lines(path)] == [0]
    assert [r["n"] for r in lines(out.spill)] == [1]
    assert out.append({"n": 2}) is None  # room again: both arrive, in order
    assert [r["n"] for r in lines(path)] == [0, 1, 2]
    assert not out.spill.exists()


def test_what_no_disk_takes_is_handed_back(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent")
    out = Appender(tmp_path / "r.jsonl")
    monkeypatch.setattr(os, "write", lambda fd, data: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "kept in memory" in out.append({"n": 1})
    monkeypatch.undo()
    assert out.close() == [{"n": 1}]
    assert lines(tmp_path / "r.jsonl") == []


def test_a_second_writer_is_told_so(tmp_path):
    path = tmp_path / "r.jsonl"
    first = Appender(path)
    with pytest.raises(OutFileBusy, match="another run is writing"):
        Appender(path)
    first.close()
    Appender(path).close()
    with hold_folder(tmp_path), pytest.raises(OutFileBusy), hold_folder(tmp_path):
        pass


WRITER = """
import sys
from calibration.records import Appender
out = Appender(sys.argv[1], shared=True)
for i in range(60):
    out.append({"who": sys.argv[2], "i": i, "pad": "y" * 500})
"""


def test_shared_writers_do_not_mix_their_lines(tmp_path):
    path = tmp_path / "r.jsonl"
    root = Path(__file__).resolve().parents[2]
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name], cwd=root) for name in "ab"]
    assert [w.wait(timeout=30) for w in writers] == [0, 0]
    found = lines(path)
    assert [r["i"] for r in found if r["who"] == "a"] == list(range(60))
    assert [r["i"] for r in found if r["who"] == "b"] == list(range(60))


def test_gzip_members_read_as_one_file(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    for part in range(2):
        out = Appender(path, is_gzip=True)
        out.append({"part": part})
        out.close()
    with gzip.open(path, "rt") as file:
        assert [json.loads(line)["part"] for line in file] == [0, 1]


def test_cells_done_are_found_by_either_name_of_the_run(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"run_id": "v__h__a", "cell_id": "1"}\n{"run_id": "v__h__ba", "cell_id": "2"}\n{"cell_id": "3"}\n')
    assert set(cells_done([path, tmp_path / "none"], "a")) == {"1"}
    assert set(cells_done([path], "v__h__ba")) == {"2"}


def test_an_unwritable_place_is_one_sentence():
    with pytest.raises(CalibrationError, match=r"cannot write '/proc/nothing/r.jsonl'"):
        Appender("/proc/nothing/r.jsonl")

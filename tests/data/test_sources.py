"""Records are found where they stand, in every kind of file."""

import json
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from glm45_jax.data import SourceConfig, open_source
from glm45_jax.data.files import find_files
from glm45_jax.data.sources import RecordError
from glm45_jax.errors import UserError


def source(*paths, **kwargs):
    return open_source(SourceConfig(path=tuple(map(str, paths)), **kwargs))


def write_array_record(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_text_files_are_covered_without_gap_or_overlap(tmp_path, chunk):
    text = "".join(f"line {i} äöü €\n" * (i % 3) + "\n" * (i % 2) for i in range(40)) + "no newline at the end"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("short")
    (tmp_path / "empty.txt").write_text("")
    records = source(tmp_path, chunk_bytes=chunk)
    parts = [records[i] for i in range(len(records))]
    assert "".join(p["text"] for p in parts) == text + "short"
    # each file's end is seen, once behind text
    assert sum(p["complete"] for p in parts if p["text"]) == 2


def test_a_line_longer_than_a_chunk_is_cut_between_characters(tmp_path):
    text = "€" * 500
    (tmp_path / "a.txt").write_text(text)
    records = source(tmp_path / "a.txt", chunk_bytes=64)
    assert len(records) == 24
    assert "".join(records[i]["text"] for i in range(len(records))) == text


def test_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\xff")
    with pytest.raises(RecordError, match="byte 4 is 0xff"):
        source(tmp_path / "a.txt")[0]


def test_jsonl_lines_and_places(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "1"}\r\n\r\n\n{"text": "2"}\n')
    (tmp_path / "b.jsonl").write_bytes(b'\n{"text": "3"}')
    records = source(tmp_path / "*.jsonl")
    assert [records[i]["text"] for i in range(len(records))] == ["1", "2", "3"]
    assert [records.place(i).split("/")[-1] for i in range(3)] == ["a.jsonl:1", "a.jsonl:4", "b.jsonl:2"]


def test_jsonl_longer_than_a_scanned_block(tmp_path, monkeypatch):
    monkeypatch.setattr("glm45_jax.data.sources._SCAN_BYTES", 32)
    lines = [{"text": "x" * (i % 50)} for i in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    records = source(tmp_path / "a.jsonl")
    assert [records[i] for i in range(len(records))] == lines


def test_array_records(tmp_path):
    write_array_record(tmp_path / "a.array_record", [json.dumps({"text": t}).encode() for t in "ab"])
    write_array_record(tmp_path / "b.array_record", [json.dumps({"text": "c"}).encode()])
    records = source(tmp_path / "a.array_record", tmp_path / "b.array_record")
    assert [records[i]["text"] for i in range(len(records))] == ["a", "b", "c"]
    assert records.place(2).endswith("b.array_record, record 0")
    write_array_record(tmp_path / "t.array_record", [np.arange(5, dtype="<u2").tobytes(), b"abc"])
    records = source(tmp_path / "t.array_record", record="uint16")
    np.testing.assert_array_equal(records[0]["tokens"], np.arange(5))
    with pytest.raises(RecordError, match="3 bytes are no whole number of uint16"):
        records[1]


def test_a_damaged_array_record_chunk_costs_its_records_alone(tmp_path):
    rng = np.random.default_rng(0)
    want = [rng.integers(0, 2**31, 200) for _ in range(100)]
    path = tmp_path / "a.array_record"
    write_array_record(path, [tokens.astype("<i4").tobytes() for tokens in want])
    raw = bytearray(path.read_bytes())
    middle = raw.index(want[50].astype("<i4").tobytes()[:8])
    raw[middle : middle + 100] = bytes(100)
    path.write_bytes(raw)
    records = source(path, record="int32")
    damaged = []
    for i, tokens in enumerate(want):
        try:
            np.testing.assert_array_equal(records[i]["tokens"], tokens)
        except RecordError as error:
            assert error.reason == "unreadable" and "Corrupted" in str(error)
            damaged.append(i)
    assert 50 in damaged and len(damaged) <= 2
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(UserError, match="not readable as ArrayRecord"):
        source(path)


def test_directories_and_globs(tmp_path):
    (tmp_path / "deep" / ".hidden").mkdir(parents=True)
    for name in ("b.txt", "deep/a.txt", "deep/.dot.txt", "deep/.hidden/c.txt"):
        (tmp_path / name).write_text("x")
    names = [str(Path(p.path).relative_to(tmp_path)) for p in find_files([str(tmp_path)])]
    assert names == ["b.txt", "deep/a.txt"]
    assert find_files([str(tmp_path / "**/*.txt"), str(tmp_path)]) == find_files([str(tmp_path)])


def test_what_cannot_be_opened(tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "false.array_record").write_text("text")
    (tmp_path / "a.txt").write_text("text")
    for path, why in [
        ("missing.txt", "no such file"),
        ("none", "no files"),
        ("empty.jsonl", "no records"),
        ("false.array_record", "not readable as ArrayRecord"),
        (".", "several kinds"),
    ]:
        with pytest.raises(UserError, match=why):
            source(tmp_path / path)
    with pytest.raises(UserError, match="path"):
        SourceConfig(path=())

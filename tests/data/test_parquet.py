"""Parquet rows by number, of files local and remote, with bounded memory and damage named."""

import json
import sys

import numpy as np
import pytest

from glm45_jax.data import DataConfig, SourceConfig, build_data, open_source
from glm45_jax.data.encode import encode_record
from glm45_jax.data.sources import RecordError
from glm45_jax.errors import UserError
from glm45_jax.text import train_tokenizer

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"k": 1}'}}]}
CHATS = [
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "r"}],
    [{"role": "user", "content": "q"}, CALL, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "3"}],
]
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"properties": {name: {"type": "string"}}}}}
    for name in "fg"
]


def write(path, columns, rows_per_group=10, **kwargs):
    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group, **kwargs)
    return str(path)


def source(*paths, **kwargs):
    return open_source(SourceConfig(path=paths, **kwargs))


def test_rows_of_several_files_and_groups(tmp_path):
    a = write(tmp_path / "a.parquet", {"id": list(range(25)), "text": [f"a{i}" for i in range(25)]})
    b = write(tmp_path / "b.parquet", {"text": [f"b{i}" for i in range(12)], "tokens": [None] * 12})
    records = source(a, b)
    order = np.random.default_rng(0).permutation(37)
    assert {i: records[i] for i in order} == {i: {"text": f"a{i}" if i < 25 else f"b{i - 25}"} for i in order}
    assert records.place(24) == f"{a}, row 24 (row group 2)" and records.place(36) == f"{b}, row 11 (row group 1)"


def test_conversations_and_tokens_are_those_of_jsonl(tmp_path):
    """Structs of a column have all fields that any has: what is null there is no part of a message."""
    tokenizer = train_tokenizer(["q a r f k"], 300)
    nested = write(tmp_path / "a.parquet", {"messages": CHATS, "tools": [None, TOOLS]})
    texts = write(tmp_path / "b.parquet", {"messages": [json.dumps(chat) for chat in CHATS]})
    for i, chat in enumerate(CHATS):
        want = encode_record({"messages": chat, "tools": TOOLS if i else None}, tokenizer)
        for got in zip(want, encode_record(source(nested)[i], tokenizer), strict=True):
            np.testing.assert_array_equal(*got)
        np.testing.assert_array_equal(
            encode_record({"messages": chat}, tokenizer)[0], encode_record(source(texts)[i], tokenizer)[0]
        )
    path = write(tmp_path / "c.parquet", {"tokens": [[1, 2, 3], [4]], "loss_mask": [[1, 0, 1], None]})
    tokens, mask = encode_record(source(path)[0], None, vocab_size=9)
    assert tokens.tolist() == [1, 2, 3] and mask.tolist() == [True, False, True]
    assert encode_record(source(path)[1], None, vocab_size=9)[1].tolist() == [True]


def test_memory_is_bounded(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", {"text": [f"{i}" * 1000 for i in range(100)]})
    monkeypatch.setattr("glm45_jax.data.parquet._CACHE_BYTES", 40_000)
    records = source(path)
    assert not records.fits_memory
    for i in np.random.default_rng(0).permutation(100):
        assert records[i]["text"] == f"{i}" * 1000
        assert sum(table.nbytes for table in records._cache.values()) <= 40_000
    monkeypatch.setattr("glm45_jax.data.parquet._CACHE_BYTES", 1)
    assert records[99]["text"] == "99" * 1000, "one group is kept in any case"


def test_a_damaged_row_group_is_named_or_counted(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"{i} {np.random.default_rng(i).bytes(200).hex()}" for i in range(30)]
    write(path, {"text": texts}, compression="zstd", use_dictionary=False)
    group = pq.ParquetFile(path).metadata.row_group(1).column(0)
    raw = bytearray(path.read_bytes())
    middle = group.data_page_offset + group.total_compressed_size // 2
    raw[middle - 60 : middle + 60] = bytes(120)
    path.write_bytes(raw)
    records = source(str(path))
    assert records[9]["text"].startswith("9 ") and records[20]["text"].startswith("20 ")
    with pytest.raises(RecordError, match="row group 1 cannot be read"):
        records[10]
    tokenizer = train_tokenizer(["0123456789 abcdef"], 300)

    def data(**kwargs):
        config = DataConfig(sources=(SourceConfig(path=(str(path),), **kwargs),), epochs=1)
        return build_data(config, tokenizer, 1, 64)

    with pytest.raises(UserError, match=r"a\.parquet, row 1\d \(row group 1\): row group 1 cannot be read"):
        list(data())
    skipping = data(on_error="skip")
    list(skipping)
    assert skipping.skipped_by_source() == {str(path): {"unreadable": 10}}


def test_what_cannot_be_opened(tmp_path, monkeypatch):
    other = write(tmp_path / "a.parquet", {"content": ["x"]})
    with pytest.raises(UserError, match="no column 'text', 'messages' or 'tokens'; it has content"):
        source(other)
    (tmp_path / "b.parquet").write_text("no parquet")
    with pytest.raises(UserError, match="not readable as Parquet"):
        source(str(tmp_path / "b.parquet"))
    empty = write(tmp_path / "c.parquet", {"text": pa.array([], pa.string())})
    with pytest.raises(UserError, match="no records"):
        source(empty)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'glm45-jax\[data\]'"):
        source(other)

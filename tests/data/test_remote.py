"""Remote files by fsspec: an in-memory file system goes the way that gs:// goes."""

import json
import pickle
import sys

import numpy as np
import pytest

from glm45_jax.data import DataConfig, SourceConfig, build_data, open_source
from glm45_jax.data.files import find_files
from glm45_jax.data.tokenize import tokenize
from glm45_jax.errors import UserError
from glm45_jax.text import train_tokenizer

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def bucket():
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def put(system, name, text):
    system.pipe_file(f"/bucket/{name}", text.encode() if isinstance(text, str) else text)


def batches(path, tokenizer, **kwargs):
    source = SourceConfig(path=(str(path),), **kwargs)
    return list(build_data(DataConfig(sources=(source,), epochs=1), tokenizer, 2, 16))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["hello world"] * 3, 300)


def contents(kind, tmp_path):
    texts = [f"hello world {i} €\n" * (1 + i % 3) for i in range(20)]
    if kind == "txt":
        return "".join(texts).encode()
    if kind == "jsonl":
        return "\n".join(json.dumps({"text": text}) for text in texts).encode()
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": texts}), tmp_path / "made", row_group_size=6)
    return (tmp_path / "made").read_bytes()


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_the_batches_of_a_local_file(bucket, tokenizer, tmp_path, kind):
    raw = contents(kind, tmp_path)
    (tmp_path / f"a.{kind}").write_bytes(raw)
    put(bucket, f"deep/a.{kind}", raw)
    put(bucket, "deep/.hidden/b.txt", "hidden")
    want = batches(tmp_path / f"a.{kind}", tokenizer, chunk_bytes=64)
    for path in ("memory://bucket/deep", f"memory://bucket/**/*.{kind}", f"memory://bucket/deep/a.{kind}"):
        for one, other in zip(want, batches(path, tokenizer, chunk_bytes=64), strict=True):
            np.testing.assert_array_equal(one["tokens"], other["tokens"])


def test_tokenising_remote_files(bucket, tokenizer, tmp_path):
    put(bucket, "a.jsonl", contents("jsonl", tmp_path))
    tokenizer.save(tmp_path / "tokenizer")
    source = SourceConfig(path=("memory://bucket",))
    assert tokenize(source, tmp_path / "tokenizer", tmp_path / "out", workers=1).records == 20
    assert pickle.loads(pickle.dumps(find_files(source.path)))[0].size == len(contents("jsonl", tmp_path))


def test_places_and_what_is_refused(bucket, tmp_path, monkeypatch):
    put(bucket, "a.jsonl", '{"text": "x"}\n')
    assert open_source(SourceConfig(path=("memory://bucket/a.jsonl",))).place(0) == "memory:///bucket/a.jsonl:1"
    for path, why in [
        ("memory://bucket/none.txt", "no such file"),
        ("memory://nothing/*.txt", "no such file"),
        ("nonsense://bucket/a", "nonsense"),
    ]:
        with pytest.raises(UserError, match=why):
            find_files([path])
    put(bucket, "b.array_record", "x")
    with pytest.raises(UserError, match="read locally or at gs://"):
        open_source(SourceConfig(path=("memory://bucket/b.array_record",)))
    put(bucket, "c.jsonl.gz", "x")
    with pytest.raises(UserError, match="compressed files have no random access"):
        open_source(SourceConfig(path=("memory://bucket/c.jsonl.gz",)))
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        UserError, match=r"gs://bucket: reading it needs the data extra: pip install 'glm45-jax\[data\]'"
    ):
        find_files(["gs://bucket"])


def test_a_file_that_has_changed(bucket, tokenizer):
    put(bucket, "a.jsonl", contents("jsonl", None))
    source = SourceConfig(path=("memory://bucket/a.jsonl",), on_error="skip")
    data = build_data(DataConfig(sources=(source,), prefetch=0), tokenizer, 2, 16)
    put(bucket, "a.jsonl", "{}")
    with pytest.raises(UserError, match="has become shorter"):
        for _ in range(20):
            next(data)
    bucket.rm("/bucket/a.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        next(data)

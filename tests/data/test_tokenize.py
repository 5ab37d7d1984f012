"""Tokenising once gives what training would have made on the fly, whole or not at all, wherever it was stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from glm45_jax.cli import main
from glm45_jax.data import DataConfig, SourceConfig, build_data, open_source
from glm45_jax.data.encode import encode_record
from glm45_jax.data.sources import open_source as open_any
from glm45_jax.data.tokenize import plan_jobs, tokenize
from glm45_jax.errors import UserError
from glm45_jax.text import Tokenizer, train_tokenizer

CHAT = {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["hello world, 1+1? def f(x): return x"] * 3, 310).save(folder)
    return folder


@pytest.fixture
def corpus(tmp_path):
    """Two files of JSONL: documents, conversations, an empty document and lines that are no records."""
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": "hello world " * int(rng.integers(1, 9))}) for _ in range(60)]
    lines[5:5] = [json.dumps(CHAT)] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:20]))
    (tmp_path / "b.jsonl").write_text("\n".join([*lines[20:], '{"text": ""}', '{"text": 3}', "no"]))
    return SourceConfig(path=(str(tmp_path / "*.jsonl"),), on_error="skip")


def content(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(Path(folder).rglob("*")) if f.is_file()}


def test_tokens_are_those_of_training(corpus, tokenizer_dir, tmp_path):
    report = tokenize(corpus, tokenizer_dir, tmp_path / "out", input_bytes=500, workers=1)
    tokenizer, source = Tokenizer.load(tokenizer_dir), open_any(corpus)
    made = open_source(SourceConfig(path=(str(tmp_path / "out"),)))
    assert report.skipped == {"empty": 1, "malformed": 1, "unreadable": 1}
    assert report.records == len(made) == len(source) - 3 and report.files > 3
    for i in range(report.records):
        tokens, targets = encode_record(source[i], tokenizer)
        np.testing.assert_array_equal(made[i]["tokens"], tokens)
        np.testing.assert_array_equal(made[i]["loss_mask"], targets)
    assert report.tokens == sum(len(made[i]["tokens"]) for i in range(len(made))) > report.targets > 0


def test_training_reads_the_same_batches(corpus, tokenizer_dir, tmp_path):
    tokenize(corpus, tokenizer_dir, tmp_path / "out", input_bytes=500, workers=1)
    tokenizer = Tokenizer.load(tokenizer_dir)

    def batches(*path):
        config = DataConfig(sources=(SourceConfig(path=path, on_error="skip"),), epochs=1, shards=1, shuffle=False)
        return list(build_data(config, tokenizer, 4, 32))

    for want, got in zip(batches(*corpus.path), batches(str(tmp_path / "out")), strict=True):
        for key in want:
            np.testing.assert_array_equal(want[key], got[key])
    other = train_tokenizer(["other other other"], 300)
    with pytest.raises(UserError, match="of another tokenizer"):
        build_data(DataConfig(sources=(SourceConfig(path=(str(tmp_path / "out"),)),)), other, 4, 32)


def test_filling_in_from_tokens_is_filling_in_from_text(corpus, tokenizer_dir, tmp_path):
    tokenize(corpus, tokenizer_dir, tmp_path / "out", workers=1)
    tokenizer = Tokenizer.load(tokenizer_dir)

    def documents(*path):
        source = SourceConfig(path=path, on_error="skip", fim_rate=0.6, packing="best_fit", overlong="drop")
        config = DataConfig(sources=(source,), epochs=2, shards=1, shuffle=False)
        return np.concatenate([batch["tokens"].ravel() for batch in build_data(config, tokenizer, 1, 128)])

    found = documents(str(tmp_path / "out"))
    assert 20 < np.sum(found == tokenizer.token_id("<|code_middle|>")) < 90
    # as many records stand in front of each, since what is left out stands at the end: the same numbers, the same cuts
    one_epoch = lambda tokens: tokens[: len(tokens) // 3]  # noqa: E731
    np.testing.assert_array_equal(one_epoch(found), one_epoch(documents(*corpus.path)))


class Stop(Exception):
    pass


def test_stopped_and_continued_is_byte_for_byte_the_same(corpus, tokenizer_dir, tmp_path):
    tokenize(corpus, tokenizer_dir, tmp_path / "want", input_bytes=500, workers=1)
    jobs = plan_jobs(open_any(corpus), 500)
    assert len(jobs) > 4

    def stop_at(records):
        def progress(done, total):
            if done >= records:
                raise Stop

        return progress

    for records in (10, 30, 50):
        with pytest.raises(Stop):
            tokenize(corpus, tokenizer_dir, tmp_path / "out", input_bytes=500, workers=1, progress=stop_at(records))
        assert not (tmp_path / "out").exists(), "what is not whole does not look so"
        assert not [f for f in content(tmp_path / "out.partial") if f.startswith(".notes/tokens")]
    begun = {f: (tmp_path / "out.partial" / f).stat().st_mtime_ns for f in content(tmp_path / "out.partial")}
    report = tokenize(corpus, tokenizer_dir, tmp_path / "out", input_bytes=500, workers=1)
    assert 0 < report.new_tokens < report.tokens
    assert content(tmp_path / "out") == content(tmp_path / "want")
    kept = [
        f for f, when in begun.items() if f.startswith("tokens") and (tmp_path / "out" / f).stat().st_mtime_ns == when
    ]
    assert len(kept) >= 2, "finished files are not made again"
    assert tokenize(corpus, tokenizer_dir, tmp_path / "out", input_bytes=500).new_tokens == 0


def test_what_is_refused(corpus, tokenizer_dir, tmp_path):
    with pytest.raises(UserError, match=r"b\.jsonl:45: 'text' must be a string"):
        tokenize(SourceConfig(path=corpus.path), tokenizer_dir, tmp_path / "fatal", workers=1)
    with pytest.raises(UserError, match=r"made of something else \(input_bytes differ\)"):
        tokenize(SourceConfig(path=corpus.path), tokenizer_dir, tmp_path / "fatal", workers=1, input_bytes=99)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="is no tokenised data"):
        tokenize(corpus, tokenizer_dir, tmp_path / "there", workers=1)
    assert tokenize(corpus, tokenizer_dir, tmp_path / "there", workers=1, overwrite=True).records == 63
    with pytest.raises(UserError, match=r"made of something else \(append_eos differ\)"):
        tokenize(corpus, tokenizer_dir, tmp_path / "there", workers=1, append_eos=False)
    (tmp_path / "none.jsonl").write_text("nothing\n")
    with pytest.raises(UserError, match=r"no record of .* can be used"):
        tokenize(SourceConfig(path=(str(tmp_path / "none.jsonl"),), on_error="skip"), tokenizer_dir, tmp_path / "n")


def test_command(corpus, tokenizer_dir, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(
        f"model: tiny\nsteps: 1\nseq_len: 16\ntokenizer: {{path: {tokenizer_dir}}}\n"
        f"data: {{append_eos: false, sources: [{{path: '{corpus.path[0]}', on_error: skip}}]}}\n"
    )
    assert main(["tokenize", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "o"), "--workers", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["records"] == 63 and report["skipped"] == {"empty": 1, "malformed": 1, "unreadable": 1}
    args = ["tokenize", "--source", *corpus.path, "--out", str(tmp_path / "p"), "--workers", "1"]
    assert main(args) == 2 and "--tokenizer" in capsys.readouterr().err
    assert main([*args, "--tokenizer", str(tokenizer_dir)]) == 2 and "must be a string" in capsys.readouterr().err
    assert main([*args, "--tokenizer", str(tokenizer_dir), "--on-error", "skip", "--overwrite"]) == 0
    assert "63 documents" in capsys.readouterr().out
    assert main(["tokenize"]) == 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_killed_with_workers_and_continued(tokenizer_dir, tmp_path):
    """SIGKILL in the midst of two workers' jobs: the workers end too, and the same command ends with the same bytes."""
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": "hello world, 1+1? " * 60}) + "\n") * 900)
    args = ["tokenize", "--source", str(tmp_path / "a.jsonl"), "--tokenizer", str(tokenizer_dir), "--workers", "2"]
    args += ["--megabytes-per-file", "0.15", "--json"]
    code = "import sys; from glm45_jax.cli import main\nif __name__ == '__main__': sys.exit(main(sys.argv[1:]))"
    start = lambda out: subprocess.Popen([sys.executable, "-c", code, *args, "--out", str(out)])  # noqa: E731
    assert start(tmp_path / "want").wait(120) == 0
    running = start(tmp_path / "out")
    notes = tmp_path / "out.partial" / ".notes"
    while len(list(notes.glob("0*.json"))) < 1:
        assert running.poll() is None, "it was over before it could be killed"
        time.sleep(0.01)
    workers = children(running.pid)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "out").exists()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(workers) >= 2 and not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert start(tmp_path / "out").wait(120) == 0
    assert content(tmp_path / "out") == content(tmp_path / "want")


def children(parent):
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in found]

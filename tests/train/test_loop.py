"""A run that is stopped and goes on ends as one that was never stopped, and what it leaves behind is whole."""

import importlib.metadata
import importlib.util
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from glm45_jax.convert import load_checkpoint
from glm45_jax.data import DataConfig, SourceConfig
from glm45_jax.errors import UserError
from glm45_jax.train import export_newest, params_digest, read_metrics, train
from glm45_jax.train.loop import _only_one, _with_tokens_of
from glm45_jax.train.tokenizer import prepare_tokenizer
from tests.support import QUICK_FLAGS, ROOT

pytestmark = pytest.mark.usefixtures("quick")


class Crash(Exception):
    pass


def crash_at(step):
    def on_metrics(now, _):
        if now == step:
            raise Crash

    return on_metrics


def in_folder(config, name):
    return config.replace(output_dir=str(Path(str(config.output_dir)).with_name(name)))


def losses(config):
    return [(m["step"], m["cross_entropy"]) for m in read_metrics(config.output_dir)]


@pytest.fixture
def reference(run_config):
    result = train(run_config)
    assert result.finished and int(result.state.step) == 12
    return result.digest(), losses(run_config)


@pytest.mark.slow
def test_a_trace_of_some_steps_and_the_goodput(run_config):
    """In a process of its own: no trace is taken in one that has compiled for TPUs with a libtpu of another release."""
    config = run_config.replace(profile_steps=(2, 3))
    seen = json.loads(in_process(config, "").stdout)
    assert seen[:4] == [[1, 0], [2, 0], [3, 1], [4, 1]], "written behind its last step"
    shares = [m["goodput"] for m in read_metrics(config.output_dir)]
    assert 0 <= shares[0] < shares[-1] < 1, "the first step is mostly compilation"


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="pip install -e '.[aot]'")
def test_a_trace_beside_another_libtpu_is_left_out(run_config):
    """Its profiler is called by jax's in another form: a segmentation fault."""
    loaded = """
from pallas_kernels.analysis.compile import described_mesh
described_mesh("v5e")
"""
    done = in_process(run_config.replace(profile_steps=(2, 3)), loaded)
    wanted = re.search(r"libtpu==([\d.]+)", str(importlib.metadata.requires("jax")))
    matches = f"{importlib.metadata.version('libtpu')}.".startswith(wanted[1])
    assert json.loads(done.stdout)[-1] == [12, int(matches)]
    assert ("no trace of step 2 on: libtpu" in done.stderr) is not matches


def in_process(config, before):
    """Trains in a new process, which runs `before` first; prints [step, traces written so far] of each step."""
    path = Path(config.output_dir).with_name("config.pickle")
    path.write_bytes(pickle.dumps(config))
    code = f"""{before}
import json, pathlib, pickle
from glm45_jax.train import train
config, seen = pickle.loads(pathlib.Path({str(path)!r}).read_bytes()), []
traces = lambda: list((pathlib.Path(config.output_dir) / "profile").rglob("*.xplane.pb"))
train(config, on_metrics=lambda step, _: seen.append((step, len(traces()))))
print(json.dumps(seen))
"""
    env = {**os.environ, "XLA_FLAGS": QUICK_FLAGS}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def test_learns(reference):
    _, curve = reference
    assert [step for step, _ in curve] == list(range(1, 13))
    assert curve[-1][1] < curve[0][1] - 0.3


@pytest.mark.few(1)
@pytest.mark.parametrize("crashes", [(3,), (5, 10), (4, 6, 7, 11)])
def test_crash_and_resume(run_config, reference, crashes):
    config = in_folder(run_config, "crashed")
    for step in crashes:
        with pytest.raises(Crash):
            train(config, on_metrics=crash_at(step))
    seen = []
    result = train(config, on_metrics=lambda step, _: seen.append(step))
    assert (result.digest(), losses(config)) == reference
    assert seen == list(range((crashes[-1] - 1) // 4 * 4 + 1, 13))


@pytest.mark.slow
def test_a_signal_stops_after_the_step_at_hand(run_config, reference):
    config = in_folder(run_config, "stopped")

    def stop_at_two(step, _):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    result = train(config, on_metrics=stop_at_two)
    assert not result.finished and int(result.state.step) == 2 and result.model_dir is None
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    result = train(config)
    assert (result.digest(), losses(config)) == reference


@pytest.mark.slow
def test_the_time_ends_a_run_whole_and_more_time_goes_on(run_config, reference, monkeypatch):
    clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("glm45_jax.train.stopping.time", clock)

    def an_hour_passes(step, _):
        if step == 5:
            clock.now += 3600

    config = in_folder(run_config, "timed")
    result = train(config.replace(max_minutes=30.0), on_metrics=an_hour_passes)
    assert result.finished and int(result.state.step) == 5 and result.model_dir is not None
    assert train(config).digest() == reference[0]


def test_a_limit_of_time_is_positive(run_config):
    with pytest.raises(UserError, match="max_minutes"):
        run_config.replace(max_minutes=0.0)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_put_aside(run_config, reference):
    folder = Path(run_config.output_dir) / "checkpoints"
    for file in (folder / "12" / "state").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    assert train(run_config).digest() == reference[0]
    assert (folder / "12.damaged").is_dir() and (folder / "12").is_dir()


@pytest.mark.slow
def test_when_no_checkpoint_can_be_read(run_config, reference):
    folder = Path(run_config.output_dir) / "checkpoints"
    for file in folder.rglob("manifest.ocdbt"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint of this run can be read"):
        train(run_config)


def test_a_save_that_fails_is_told(run_config, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)
    with pytest.raises(UserError, match="No space left on device"):
        train(run_config)


def test_only_the_newest_are_kept(run_config, reference):
    assert sorted(p.name for p in (Path(run_config.output_dir) / "checkpoints").iterdir()) == ["12", "8"]


def test_a_finished_run_is_only_told(run_config, reference):
    def never(step, _):
        raise AssertionError(step)

    assert train(run_config, on_metrics=never).digest() == reference[0]


def test_the_model_at_the_end_is_the_parameters(run_config, reference):
    config, params = load_checkpoint(Path(run_config.output_dir) / "model")
    assert params_digest(params) == reference[0]
    assert config == run_config.model


@pytest.mark.slow
def test_export_of_a_stopped_run(run_config, reference):
    config = in_folder(run_config, "exported")
    with pytest.raises(UserError, match="train first"):
        export_newest(config)
    with pytest.raises(Crash):
        train(config, on_metrics=crash_at(10))
    _, params = load_checkpoint(export_newest(config))
    assert params_digest(params) not in (reference[0], "")
    assert params["embed"]["weight"].shape == (320, 32)


@pytest.mark.slow
def test_another_model_is_refused(run_config, reference):
    wider = run_config.replace(model=run_config.model.replace(routed_scaling_factor=1.0))
    with pytest.raises(UserError, match=r"routed_scaling_factor was 2\.5, is 1\.0"):
        train(wider)
    # how it is computed may change
    assert train(run_config.replace(model=run_config.model.replace(remat="full"))).finished


def test_changed_data_are_refused(run_config, corpus, tmp_path):
    own = tmp_path / "own.jsonl"
    shutil.copy(corpus, own)
    config = run_config.replace(data=DataConfig(sources=(SourceConfig(path=(str(own),)),)))
    with pytest.raises(Crash):
        train(config, on_metrics=crash_at(6))
    own.write_text(own.read_text() + '{"tokens": [1, 2, 3]}\n')
    with pytest.raises(UserError, match="not those of the checkpoint"):
        train(config)


def test_data_that_end_before_the_steps(run_config, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text('{"tokens": [1, 2, 3, 4, 5, 6, 7, 8]}\n' * 50)
    ending = DataConfig(sources=(SourceConfig(path=(str(few),)),), epochs=1)
    devices = []
    result = train(
        run_config.replace(data=ending), on_metrics=lambda *_: devices.append(jax.sharding.get_abstract_mesh().size)
    )
    assert set(devices) == {1}, "kernels are made for the device at hand"
    assert result.finished and int(result.state.step) == -(-400 // 64) and result.model_dir is not None


@pytest.mark.slow
def test_start_from_the_weights_of_a_checkpoint(run_config, reference):
    config = in_folder(run_config, "tuned").replace(init_from=str(Path(run_config.output_dir) / "model"))
    seen = []
    train(config, on_metrics=lambda step, metrics: seen.append(float(metrics["cross_entropy"])))
    assert seen[0] < reference[1][0][1] - 0.3, "the first loss is that of trained weights"
    other = config.replace(model=config.model.replace(num_hidden_layers=2), output_dir=config.output_dir + "2")
    with pytest.raises(UserError, match="init_from"):
        train(other)


@pytest.mark.slow
def test_evaluation(run_config, corpus):
    config = run_config.replace(eval_data=run_config.data, eval_every=6, eval_batches=2)
    train(config)
    values = [m["eval_cross_entropy"] for m in read_metrics(config.output_dir) if "eval_cross_entropy" in m]
    assert len(values) == 2 and values[1] < values[0]


def test_a_trained_tokenizer_knows_the_words_of_the_chat_format(run_config, tmp_path):
    """Tools come with a hundred words of instructions: in single letters they would fill most of a short row."""
    tools = [{"type": "function", "function": {"name": "look", "description": "Look", "parameters": {}}}]
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}], "tools": tools}
    unusable = '{"messages": [{"role": "nobody"}]}\nnot JSON\n'
    (tmp_path / "a.jsonl").write_text((json.dumps(chat) + "\n") * 3 + unusable)
    config = run_config.replace(
        data=DataConfig(sources=(SourceConfig(path=(str(tmp_path / "a.jsonl"),)),)),
        model=run_config.model.replace(vocab_size=1000),
    )
    tokenizer = prepare_tokenizer(config, tmp_path)
    assert tokenizer is not None
    assert [len(tokenizer.encode(word)) for word in (" signatures", " function", "hello")] == [1, 1, 1]


def test_a_tokenizer_is_trained_on_the_text_and_kept(run_config, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("the cat sat on the mat, the dog on the log. 123\n" * 20)
    config = run_config.replace(data=DataConfig(sources=(SourceConfig(path=(str(text),)),)))
    tokenizer = prepare_tokenizer(config, tmp_path)
    assert tokenizer is not None and 292 < tokenizer.vocab_size <= 320
    assert tokenizer.decode(tokenizer.encode("the 123")) == "the 123"
    text.write_text("other")
    again = prepare_tokenizer(config, tmp_path)
    assert again is not None and again.vocab_size == tokenizer.vocab_size, "a run keeps its tokenizer"
    assert prepare_tokenizer(run_config, tmp_path / "tokens") is None, "tokens need none"

    model = _with_tokens_of(tokenizer, config).model
    assert (model.eos_token_id, model.real_vocab_size) == (tokenizer.eos_ids, tokenizer.vocab_size)
    small = config.replace(model=config.model.replace(vocab_size=300))
    with pytest.raises(UserError, match=r"set model\.vocab_size=384"):
        train(small, tokenizer=tokenizer)


def test_one_process_at_a_time(run_config):
    folder = Path(run_config.output_dir)
    folder.mkdir()
    with _only_one(folder, run_config), pytest.raises(UserError, match="another process"):
        train(run_config)


def test_what_a_run_needs(run_config):
    with pytest.raises(UserError, match="output_dir"):
        train(run_config.replace(output_dir=None))
    with pytest.raises(UserError, match="no such file"):
        train(run_config.replace(data=DataConfig(sources=(SourceConfig(path=("nowhere.txt",)),))))


@pytest.mark.slow
def test_metrics_survive_a_torn_last_line(run_config, reference):
    file = Path(run_config.output_dir) / "metrics.jsonl"
    file.write_text(file.read_text()[:-20])
    assert len(read_metrics(run_config.output_dir)) == 11
    train(run_config)
    assert np.isfinite([m["loss"] for m in read_metrics(run_config.output_dir)]).all()


def test_digest_tells_names_and_bytes_apart():
    a, b = jax.numpy.arange(6.0).reshape(2, 3), jax.numpy.arange(6.0).reshape(3, 2)
    digests = {params_digest(p) for p in ({"a": a}, {"b": a}, {"a": b}, {"a": a.at[0, 0].set(-0.0)})}
    assert len(digests) == 4

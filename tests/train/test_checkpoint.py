"""Checkpoints are checked by content: whatever happens to their files, what is restored is what was saved."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from glm45_jax.errors import UserError
from glm45_jax.train import Checkpoints
from glm45_jax.train.digest import array_digests
from glm45_jax.train.placement import abstract_state

DATA = {"settings": "some", "position": [1, 2]}


@pytest.fixture(scope="module")
def state(run_config_of_module, quick_programs):
    return quick_programs[1](run_config_of_module, None, None)


@pytest.fixture(scope="module")
def saved(run_config_of_module, state, tmp_path_factory):
    """Two checkpoints, and the digests of what they hold."""
    config = run_config_of_module
    folder = tmp_path_factory.mktemp("checkpoints") / "a"
    checkpoints, digests = Checkpoints(folder, keep=2), {}
    for step in (1, 2):
        params = jax.tree.map(lambda x, step=step: x + step, state.params)
        now = dataclasses.replace(state, params=params, step=jnp.int32(step))
        checkpoints.save(now, {**DATA, "step": step}, config.model)
        digests[step] = array_digests(dataclasses.replace(now, rng=jax.random.key_data(now.rng)))
    checkpoints.wait()
    checkpoints.close()
    return folder, digests


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved[0], tmp_path / "copy"))


def restore(folder, config):
    """The step restored, and digests of everything in it; the data position is checked here."""
    checkpoints = Checkpoints(folder, keep=2)
    try:
        restored = checkpoints.restore(abstract_state(config, None), config.model)
    finally:
        checkpoints.close()
    assert restored is not None
    state, data = restored
    assert data == {**DATA, "step": int(state.step)}
    return int(state.step), array_digests(dataclasses.replace(state, rng=jax.random.key_data(state.rng)))


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 0x10
    file.write_bytes(content)


def files(folder):
    return sorted(f.relative_to(folder) for f in (folder / "2").rglob("*") if f.is_file() and f.stat().st_size)


def test_undamaged(saved, copy, run_config_of_module):
    step, digests = restore(copy, run_config_of_module)
    assert step == 2 and digests == saved[1][2]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_file_is_noticed_or_harmless(saved, tmp_path, run_config_of_module, damage):
    noticed, large = set(), set()
    for i, name in enumerate(files(saved[0])):
        folder = Path(shutil.copytree(saved[0], tmp_path / str(i)))
        file = folder / name
        size = file.stat().st_size
        if damage == "flipped":
            flip(file, size // 2)
        elif damage == "cut":
            file.write_bytes(file.read_bytes()[: size // 2])
        else:
            file.unlink()
        step, digests = restore(folder, run_config_of_module)
        assert digests == saved[1][step], f"{name}, {damage}: restored are values that were never saved"
        if step == 1:
            noticed.add(name)
        if size > 10_000 and "d" in name.parts:  # the arrays' values
            large.add(name)
    assert large and large <= noticed
    assert Path("2/about/metadata") in noticed


def test_a_flipped_bit_anywhere_in_the_values(saved, tmp_path, run_config_of_module):
    largest = max((n for n in files(saved[0]) if "d" in n.parts), key=lambda name: (saved[0] / name).stat().st_size)
    size = (saved[0] / largest).stat().st_size
    for i in range(3):
        folder = Path(shutil.copytree(saved[0], tmp_path / str(i)))
        flip(folder / largest, (2 * i + 1) * size // 6)
        step, digests = restore(folder, run_config_of_module)
        assert step == 1 and digests == saved[1][1], (largest, i)
        assert (folder / "2.damaged").is_dir()


def test_values_that_are_wrong_though_the_files_are_whole(saved, copy, run_config_of_module, caplog):
    """As after a mistake in memory or in the writing: the files' own checksums agree."""
    shutil.rmtree(copy / "2" / "state")
    shutil.copytree(copy / "1" / "state", copy / "2" / "state")
    step, _ = restore(copy, run_config_of_module)
    assert step == 1
    assert "are not those that were saved" in caplog.text and "the checkpoint before it is used" in caplog.text


def test_damaged_twice(copy, run_config_of_module):
    (copy / "2.damaged" / "x").mkdir(parents=True)
    flip(copy / "2" / "about" / "metadata", 100)
    assert restore(copy, run_config_of_module)[0] == 1
    assert (copy / "2.damaged1").is_dir()


def test_another_optimizer_is_refused(copy, run_config_of_module):
    config = run_config_of_module
    other = config.replace(optimizer=dataclasses.replace(config.optimizer, name="adamw"))
    with pytest.raises(UserError, match="another optimizer"):
        restore(copy, other)
    assert (copy / "2").is_dir(), "it is whole: it stays"


def test_kept_for_good(run_config_of_module, state, tmp_path):
    config = run_config_of_module
    checkpoints = Checkpoints(tmp_path, keep=1, keep_every=4)
    for step in range(2, 11, 2):
        checkpoints.save(dataclasses.replace(state, step=jnp.int32(step)), None, config.model)
    checkpoints.wait()
    checkpoints.close()
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [4, 8, 10]


def test_keep_every_and_profile_steps_are_checked(run_config_of_module):
    with pytest.raises(UserError, match="keep_every is 6, it must be a multiple of save_every"):
        run_config_of_module.replace(keep_every=6)
    with pytest.raises(UserError, match="profile_steps"):
        run_config_of_module.replace(profile_steps=(5, 2))

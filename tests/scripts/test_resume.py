"""scripts/tpu_vm/resume.sh: a run is brought through preemptions and crashes to its end, or given up for a reason."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.scripts.test_tpu_vm import HARD
from tests.scripts.tpu_vm import SETTINGS, Cloud, wait_for

REPLACED = ["delete", "create", *["stop"] * 2, *["setup"] * 2, *["start"] * 2]  # of two slices; none runs to be stopped
QUICK = ("--poll", "0", "--max-pause", "0")


def end(process: subprocess.Popen[str], code: int = 0) -> str:
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    return errors


def watched(cloud: Cloud, *flags: str) -> subprocess.Popen[str]:
    """A resume.sh that has looked at the workers once."""
    process = cloud.start("resume", *QUICK, *flags)
    wait_for(lambda: any("worker.sh status" in " ".join(call) for call in cloud.calls()))
    return process


@pytest.mark.slow
@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_a_preempted_tpu_is_replaced_and_the_same_command_launched(cloud: Cloud, state: str) -> None:
    cloud.launched("--set-env", "NOTE=a b", *HARD, NODE_COUNT="2", CAPACITY="spot")
    before = remembered(cloud)
    process = watched(cloud)
    cloud.set_world(states=[state], behaviour="0", created=[["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]])
    told = end(process)
    assert cloud.steps() == REPLACED
    assert remembered(cloud) == before
    for calls in cloud.glm45_calls().values():
        assert [(call["argv"], call["env"]["NOTE"]) for call in calls] == [(["train", *HARD], "a b")]
    assert state in told and "finished in every worker" in told and "delete.sh" in told


def remembered(cloud: Cloud) -> list[bytes]:
    folder = cloud.state / "my-project.us-east5-a.glm"
    return [(folder / name).read_bytes() for name in ("tpu.env", "setup", "launch")]


@pytest.mark.slow
def test_what_is_asked_for_anew_is_what_was_created(cloud: Cloud) -> None:
    """Though tpu.env says something else by now."""
    cloud.run("create", "--node-count=2", "--capacity=spot", "--runtime-version=custom")
    (first,) = [call for call in cloud.calls() if "create" in call]
    cloud.run("setup", "--extras", "tpu,viz")
    cloud.run("launch", "recipes/big.yaml")
    cloud.forget_calls()
    cloud.write_settings(**{**SETTINGS, "ACCELERATOR_TYPE": "v4-8", "NODE_COUNT": "3"})
    cloud.set_world(states=["SUSPENDED"], behaviour="0")
    end(cloud.start("resume", *QUICK))
    assert [call for call in cloud.calls() if "create" in call] == [first]
    assert sum("install tpu\\,viz" in " ".join(call) for call in cloud.calls()) == 2


@pytest.mark.slow
def test_a_slice_that_is_preempted_while_the_resource_is_active(cloud: Cloud) -> None:
    """All slices are replaced: the others cannot go on without it."""
    cloud.launched(NODE_COUNT="2")
    process = watched(cloud)
    cloud.set_world(nodes={"glm-0": "READY", "glm-1": "PREEMPTED"}, behaviour="0")
    assert "glm-1 is PREEMPTED" in end(process)
    assert cloud.steps() == REPLACED


@pytest.mark.slow
def test_a_worker_that_does_not_answer_for_a_while_is_waited_for(cloud: Cloud) -> None:
    cloud.launched()
    cloud.set_world(failures=[[["ssh", "worker.sh status"], "connection timed out", 2]])
    process = cloud.start("resume", *QUICK)
    wait_for(lambda: cloud.world()["failures"][0][2] == 0)
    cloud.run("stop")
    assert end(process).count("not every worker answers") == 2
    assert set(cloud.steps()) == {"stop"}


def test_a_crashed_run_is_launched_again(cloud: Cloud) -> None:
    cloud.launched("recipes/big.yaml", "steps=9", behaviour="1")
    cloud.set_world(behaviours=["139", "0"])
    told = end(cloud.start("resume", *QUICK))
    assert cloud.steps() == ["start", "start"]
    assert "2 exited 1)" in told and "2 exited 139)" in told
    assert [call["argv"][-1] for call in cloud.glm45_calls()["glm.0"]] == ["steps=9"] * 3


@pytest.mark.slow
def test_the_rest_of_a_run_is_stopped_before_it_is_launched_again(cloud: Cloud) -> None:
    """One worker's process is gone; the others would wait for it."""
    cloud.launched()
    kill(cloud, "glm.1")
    wait_for(lambda: cloud.states() == ["running", "lost"])
    cloud.forget_calls()
    cloud.set_world(behaviours=["0"])
    assert "1 lost)" in end(cloud.start("resume", *QUICK))
    assert cloud.steps() == ["stop", "start"]


def kill(cloud: Cloud, worker: str) -> None:
    """As the kernel does when memory is short."""
    pid = (cloud.stub / "hosts" / worker / "glm45-runs" / "glm" / "pid").read_text().strip()
    subprocess.run(["kill", "-KILL", "--", f"-{pid}"], check=True)


@pytest.mark.slow
def test_a_host_that_comes_back_empty_is_set_up(cloud: Cloud) -> None:
    """As after a repair; the others are stopped first."""
    cloud.launched()
    kill(cloud, "glm.1")
    shutil.rmtree(cloud.stub / "hosts" / "glm.1")
    cloud.set_world(behaviour="0")
    end(cloud.start("resume", *QUICK))
    assert cloud.steps() == ["stop", "setup", "start"]


@pytest.mark.slow
def test_it_gives_up_on_a_run_that_always_crashes(cloud: Cloud) -> None:
    cloud.launched(behaviour="1")
    told = end(cloud.start("resume", *QUICK, "--max-failures", "3"), code=1)
    assert cloud.steps() == ["start", "start"]
    assert "failed 3 times with no healthy run between" in told and "logs.sh" in told


@pytest.mark.slow
def test_a_healthy_run_clears_the_count_of_failures(cloud: Cloud) -> None:
    cloud.launched(behaviour="1")
    cloud.set_world(behaviours=["run"])
    process = cloud.start("resume", *QUICK, "--max-failures", "2", "--healthy", "0")
    wait_for(lambda: [len(calls) for calls in cloud.glm45_calls().values()] == [2, 2])  # what they are to do is settled
    before = len(cloud.calls())
    wait_for(lambda: sum("worker.sh status" in " ".join(call) for call in cloud.calls()[before:]) > 4)
    cloud.set_world(behaviour="0")
    kill(cloud, "glm.0")  # what still runs is stopped before all are launched again
    told = end(process)
    assert "healthy again" in told and told.count("failure 1 of 2") == 2


@pytest.mark.slow
def test_pauses_grow_and_are_bounded(cloud: Cloud) -> None:
    cloud.launched(behaviour="1")
    sleep = cloud.cwd.parent / "programs" / "sleep"
    sleep.write_text('#!/bin/sh\nexec /bin/sleep "$(case $1 in 0.*) echo "$1" ;; *) echo 0 ;; esac)"\n')
    sleep.chmod(0o755)
    told = end(cloud.start("resume", "--poll", "10", "--max-pause", "50", "--max-failures", "6"), code=1)
    pauses = [int(line.rpartition("waiting ")[2].split()[0]) for line in told.splitlines() if "waiting" in line]
    assert pauses == [10, 20, 40, 50, 50]


def test_a_command_that_is_refused_is_not_tried_again(cloud: Cloud) -> None:
    cloud.launched(behaviour="2")
    assert "the command is refused (exit 2)" in end(cloud.start("resume", *QUICK), code=1)
    assert cloud.steps() == []


def test_stop_ends_the_watching(cloud: Cloud) -> None:
    cloud.launched()
    process = watched(cloud)
    cloud.run("stop")
    assert "stopped by stop.sh" in end(process)
    assert "start" not in cloud.steps() and cloud.states() == ["exited 130"] * 2
    cloud.set_world(behaviour="0")  # resume.sh again: the run goes on
    assert "finished" in end(cloud.start("resume", *QUICK))


def test_delete_ends_the_watching(cloud: Cloud) -> None:
    cloud.launched()
    process = watched(cloud)
    cloud.run("delete", "--yes")
    assert "deleted by delete.sh" in end(process)
    assert "create" not in cloud.steps()


def test_not_knowing_is_not_absence(cloud: Cloud) -> None:
    """A gcloud that cannot look makes nothing be deleted or asked for."""
    cloud.launched()
    cloud.set_world(failures=[[["queued-resources describe"], "UNAUTHENTICATED", 99]])
    told = end(cloud.start("resume", *QUICK, "--max-failures", "3"), code=1)
    assert "gcloud did not answer" in told and cloud.steps() == []


@pytest.mark.slow
def test_failures_on_the_way_are_tried_again(cloud: Cloud) -> None:
    """Deleting, asking, setting up and launching may each fail once."""
    cloud.launched()
    once = [["delete"], ["create"], ["install"], ["worker.sh start"]]
    cloud.set_world(states=["SUSPENDED"], behaviour="0", failures=[[words, "UNAVAILABLE", 1] for words in once])
    told = end(cloud.start("resume", *QUICK))
    assert cloud.steps() == [
        *("delete", "delete", "create", "create"),
        *("stop", "setup", "stop", "setup"),  # should anything run there
        *("start", "stop", "start"),  # what was launched in part is stopped
    ]
    for failed in ("could not be deleted", "the request failed", "setup failed", "launch failed"):
        assert failed in told


def test_two_do_not_watch_one(cloud: Cloud) -> None:
    cloud.launched()
    process = watched(cloud)
    assert "another resume.sh watches glm" in end(cloud.start("resume", *QUICK), code=1)
    cloud.run("stop")
    end(process)


def test_nothing_to_resume(cloud: Cloud) -> None:
    assert "nothing to resume" in cloud.run("resume", code=1).stderr
    assert cloud.calls() == []

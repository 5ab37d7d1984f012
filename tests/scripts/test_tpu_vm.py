"""scripts/tpu_vm: what each command asks of gcloud, and what reaches the workers."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.scripts.tpu_vm import SETTINGS, WHERE, Cloud, wait_for

CREATE = ["compute", "tpus", "queued-resources", "create", "glm"]
TAIL = ["--async", "--quiet", *WHERE]
HARD = [
    "recipes/big.yaml",
    "note=two  words",
    "a='single'",
    'b="double"',
    "c=$HOME `id` \\n",
    "d=*",
    "e=líne\nbreak",
    "f=",
]


def create_call(cloud: Cloud) -> list[str]:
    (call,) = [call for call in cloud.calls() if "create" in call]
    return call


# --- create ----------------------------------------------------------------------------------------------------------


def test_create_a_slice(cloud: Cloud) -> None:
    cloud.run("create")
    shape = ["--accelerator-type=v5p-16", "--runtime-version=v2-alpha-tpuv5", "--node-id=glm"]
    assert create_call(cloud) == [*CREATE, *shape, *TAIL]


def test_create_several_slices(cloud: Cloud) -> None:
    cloud.run(
        "create",
        *("--node-count", "4", "--capacity=spot", "--accelerator-type", "v6e-256", "--valid-until-duration", "6h"),
        *("--ssh", "iap", "--network", "net", "--subnetwork=sub", "--service-account", "a@b"),
    )
    shape = ["--accelerator-type=v6e-256", "--runtime-version=v2-alpha-tpuv6e", "--node-count=4", "--node-prefix=glm"]
    how = ["--spot", "--internal-ips", "--valid-until-duration=6h"]
    net = ["--network=net", "--subnetwork=sub", "--service-account=a@b"]
    assert create_call(cloud) == [*CREATE, *shape, *how, *net, *TAIL]


def test_create_by_topology(cloud: Cloud) -> None:
    cloud.write_settings(
        **{**SETTINGS, "ACCELERATOR_TYPE": "", "TYPE": "v4", "TOPOLOGY": "4x4x8", "CAPACITY": "reserved"}
    )
    cloud.run("create")
    shape = ["--type=v4", "--topology=4x4x8", "--runtime-version=tpu-ubuntu2204-base", "--node-id=glm", "--reserved"]
    assert create_call(cloud) == [*CREATE, *shape, *TAIL]


def test_create_waits_for_capacity(cloud: Cloud) -> None:
    cloud.set_world(created=[["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]])
    told = cloud.run("create", "--poll", "0").stderr
    assert [told.count(f"glm is {s}") for s in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")] == [1, 1, 1]


def test_create_tells_of_a_request_that_failed(cloud: Cloud) -> None:
    cloud.set_world(created=[["WAITING_FOR_RESOURCES", "FAILED"]])
    assert "delete.sh, and create.sh again" in cloud.run("create", "--poll", "0", code=1).stderr


def test_settings_are_looked_up_in_order(cloud: Cloud) -> None:
    """Flags, then what was created, then tpu.env, in which comments and quotes may stand."""
    (cloud.cwd / "tpu.env").write_text(
        "# a comment\nPROJECT='my-project'\n\nZONE=us-east5-a  # another\n"
        'NAME="glm"\nACCELERATOR_TYPE=v4-8\nNODE_COUNT=3\n'
    )
    cloud.run("create", "--node-count=2")
    assert "--node-count=2" in create_call(cloud) and "--accelerator-type=v4-8" in create_call(cloud)

    def slices(*arguments: str) -> list[str]:
        return [call[5] for call in read_lines(cloud.run("stop", "--dry-run", *arguments).stdout)]

    assert slices() == ["glm-0", "glm-1"]  # what was created, not the three of tpu.env
    assert slices("--node-count", "1") == ["glm"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--project", ""], "no project. Give --project ID, or write PROJECT=ID into tpu.env"),
        (["--zone="], "no zone"),
        (["--name="], "no name"),
        (["--name", "Big_One"], "lower-case letters, digits and hyphens"),
        (["--node-count", "two"], "must be a number of slices"),
        (["--capacity", "cheap"], "on-demand, spot or reserved"),
        (["--ssh", "telnet"], "external, internal or iap"),
        (["--accelerator-type", "tpu7x-64"], "scripts/kubernetes/jobset_tpu.yaml"),
        (["--accelerator-type", "v99-8"], "Give --runtime-version"),
        (["--accelerator-type="], "--type and --topology together"),
        (["--topology", "4x4"], "--type and --topology together"),
        (["--colour", "red"], "unknown flag '--colour'"),
        (["--zone"], "--zone needs a value"),
        (["now"], "'now' is not understood"),
        (["--env-file", "none.env"], "none.env: no such file"),
    ],
)
def test_create_refuses(cloud: Cloud, arguments: list[str], told: str) -> None:
    assert told in cloud.run("create", *arguments, code=1).stderr
    assert cloud.calls() == []


@pytest.mark.parametrize(
    ("line", "told"),
    [("COLOUR=red", "tpu.env:1: there is no setting 'COLOUR'"), ("rm -rf /", "tpu.env:1: expected KEY=VALUE")],
)
def test_a_bad_line_of_settings(cloud: Cloud, line: str, told: str) -> None:
    (cloud.cwd / "tpu.env").write_text(line + "\n")
    assert told in cloud.run("create", code=1).stderr


def test_settings_are_not_executed(cloud: Cloud) -> None:
    cloud.write_settings(**{**SETTINGS, "NETWORK": '"$(touch ran)`touch ran`"'})
    cloud.run("create")
    assert "--network=$(touch ran)`touch ran`" in create_call(cloud)
    assert not (cloud.cwd / "ran").exists()


def test_without_gcloud(cloud: Cloud) -> None:
    programs = Path(cloud.environment["PATH"].split(":")[0])
    (programs / "gcloud").unlink()
    for name in ("bash", "dirname", "awk", "grep", "cat"):
        (programs / name).symlink_to(f"/bin/{name}")
    cloud.environment["PATH"] = str(programs)
    assert "gcloud is not on the PATH. Install it" in cloud.run("create", code=1).stderr


def test_create_when_it_is_there(cloud: Cloud) -> None:
    cloud.set_world(states=["SUSPENDED"])
    assert "exists already and is SUSPENDED" in cloud.run("create", code=1).stderr
    assert cloud.steps() == []


def test_not_knowing_is_not_absence(cloud: Cloud) -> None:
    """When gcloud fails for another reason, nothing is created."""
    cloud.set_world(failures=[[["describe"], "UNAUTHENTICATED: no credentials", 1]])
    told = cloud.run("create", code=1).stderr
    assert "UNAUTHENTICATED" in told and "gcloud auth login" in told
    assert cloud.steps() == []


def test_create_tells_of_quota(cloud: Cloud) -> None:
    cloud.set_world(failures=[[["create"], "RESOURCE_EXHAUSTED: quota", 1]])
    told = cloud.run("create", code=1).stderr
    assert "RESOURCE_EXHAUSTED" in told and "Often it is quota" in told
    assert not (cloud.state / "my-project.us-east5-a.glm").exists()


# --- setup -----------------------------------------------------------------------------------------------------------


def test_setup_copies_the_checkout(cloud: Cloud) -> None:
    """Tracked and new files reach every worker, ignored ones do not, and files that are gone here go there too."""
    git = ["git", "-C", str(cloud.checkout)]
    (cloud.checkout / ".gitignore").write_text("*.secret\n")
    (cloud.checkout / "a.secret").write_text("hidden")
    (cloud.checkout / "gone.py").write_text("old")
    subprocess.run([*git, "add", "-A"], check=True)
    (cloud.checkout / "with space.py").write_text("new")
    cloud.run("create", "--node-count=2")
    cloud.run("setup")
    workers = [cloud.stub / "hosts" / name / "glm45-jax" for name in ("glm-0.0", "glm-0.1", "glm-1.0", "glm-1.1")]
    for worker in workers:
        assert (worker / "with space.py").read_text() == "new" and (worker / "gone.py").exists()
        assert (worker / "scripts/tpu_vm/worker.sh").exists() and not (worker / "a.secret").exists()
        (worker / "runs").mkdir()
    (cloud.checkout / "gone.py").unlink()  # still tracked
    cloud.run("setup")
    for worker in workers:
        assert not (worker / "gone.py").exists()
        assert (worker / "runs").exists() and (worker / ".venv/.ready").exists()


def test_setup_calls(cloud: Cloud) -> None:
    cloud.run("create")
    cloud.forget_calls()
    cloud.run("setup", "--extras", "tpu,data,viz")
    look, copy, unpack, install = cloud.calls()
    assert "worker.sh status glm" in look[6]
    assert copy[:4] == ["compute", "tpus", "tpu-vm", "scp"] and copy[4].endswith("/glm45-jax.tar.gz")
    assert copy[5:] == ["glm:", "--worker=all", "--quiet", *WHERE]
    for call in (unpack, install):
        assert call[:6] == ["compute", "tpus", "tpu-vm", "ssh", "glm", "--worker=all"]
    assert install[6] == r"--command=bash glm45-jax/scripts/tpu_vm/worker.sh install tpu\,data\,viz"


def test_setup_leaves_a_run_alone(cloud: Cloud) -> None:
    """Modules that it has yet to import would change under it."""
    cloud.launched()
    assert "a run is at work on glm" in cloud.run("setup", code=1).stderr
    assert cloud.steps() == []


def test_setup_before_the_tpu_is_there(cloud: Cloud) -> None:
    cloud.run("create", "--no-wait")
    cloud.set_world(nodes={"glm": "CREATING"})
    assert "is glm ACTIVE?" in cloud.run("setup", code=1).stderr


def test_setup_by_git(cloud: Cloud) -> None:
    """A commit is cloned on the workers; nothing is copied."""
    source = cloud.cwd / "a repository"
    shutil.copytree(cloud.checkout, source)
    git = ["git", "-C", str(source), "-c", "user.name=n", "-c", "user.email=e"]
    (source / "mark").write_text("from git")
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "m"], check=True)
    subprocess.run([*git, "branch", "feature"], check=True)
    cloud.run("create")
    cloud.run("setup", "--git", str(source), "--ref", "feature")
    for worker in ("glm.0", "glm.1"):
        assert (cloud.stub / "hosts" / worker / "glm45-jax" / "mark").read_text() == "from git"
    assert "was not cloned in every worker" in cloud.run("setup", "--git", str(source), "--ref", "none", code=1).stderr
    assert cloud.states() == ["not-set-up"] * 2  # though the environment is still there


def test_setup_tells_which_slice_failed(cloud: Cloud) -> None:
    cloud.run("create", "--node-count=3")
    cloud.set_world(failures=[[["ssh", "glm-1", "install"], "no route to host", 1]])
    told = cloud.run("setup", code=1).stderr
    assert "failed on: glm-1 " in told and "ssh-add" in told and "not installed in every worker" in told
    assert not (cloud.state / "my-project.us-east5-a.glm" / "setup").exists()


def test_ssh_by_iap_is_of_the_alpha_track(cloud: Cloud) -> None:
    cloud.run("create", "--ssh", "iap")
    cloud.forget_calls()
    cloud.run("setup")
    assert all(call[0] == "alpha" and "--tunnel-through-iap" in call for call in cloud.calls())
    cloud.forget_calls()
    cloud.run("setup", "--ssh=internal")
    assert all(call[0] == "compute" and "--internal-ip" in call for call in cloud.calls())


# --- launch, status, logs, stop --------------------------------------------------------------------------------------


def test_launch_hands_arguments_on_as_they_are(cloud: Cloud) -> None:
    """Spaces, quotes, dollars, stars, newlines and empty values reach every worker of every slice unchanged."""
    cloud.launched("--set-env", 'NOTE=it\'s $5  "big"', "--set-env", "X=1", *HARD, NODE_COUNT="2")
    wait_for(lambda: len(cloud.glm45_calls()) == 4)
    for calls in cloud.glm45_calls().values():
        (call,) = calls
        assert call["argv"] == ["train", *HARD]
        assert call["env"]["NOTE"] == 'it\'s $5  "big"' and call["env"]["X"] == "1"
        assert call["cwd"].endswith("/glm45-jax")
    assert cloud.states() == ["running"] * 4


@pytest.mark.slow
def test_a_run_outlives_its_launch_and_stops_by_sigterm(cloud: Cloud) -> None:
    cloud.launched()
    assert cloud.states() == ["running", "running"]
    cloud.run("stop")
    assert cloud.states() == ["exited 130", "exited 130"]  # as glm45 does after it has saved


@pytest.mark.slow
def test_launch_twice(cloud: Cloud) -> None:
    cloud.launched()
    assert "is running already" in cloud.run("launch", "recipes/big.yaml", code=1).stderr
    assert cloud.states() == ["running", "running"]
    cloud.run("launch", "--restart", "recipes/big.yaml", "steps=7")
    wait_for(lambda: all(len(calls) == 2 for calls in cloud.glm45_calls().values()))
    assert {calls[1]["argv"][-1] for calls in cloud.glm45_calls().values()} == {"steps=7"}


def test_launch_before_setup(cloud: Cloud) -> None:
    cloud.run("create")
    assert "not every worker is set up; run setup.sh" in cloud.run("launch", "recipes/big.yaml", code=1).stderr
    assert cloud.steps() == ["create"]


@pytest.mark.slow
def test_a_launch_in_some_slices_only_is_undone(cloud: Cloud) -> None:
    """A run in part of the slices would wait for the others until it times out."""
    cloud.run("create", "--node-count=2")
    cloud.run("setup")
    cloud.set_world(failures=[[["ssh", "glm-1", "worker.sh start"], "connection lost", 1]])
    told = cloud.run("launch", "recipes/big.yaml", code=1).stderr
    assert "failed on: glm-1 " in told and "stopped where it was" in told
    assert "running" not in cloud.states() and "exited 130" in cloud.states()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "no configuration"),
        (["recipes/none.yaml"], "recipes/none.yaml: no such file in the checkout"),
        (["--set-env", "1=2", "recipes/big.yaml"], "--set-env needs KEY=VALUE"),
        (["--log-dir", "/tmp", "recipes/big.yaml"], "--log-dir needs a gs:// path"),
        (["--fast", "1", "recipes/big.yaml"], "unknown flag '--fast'"),
    ],
)
def test_launch_refuses(cloud: Cloud, arguments: list[str], told: str) -> None:
    assert told in cloud.run("launch", *arguments, code=1).stderr
    assert cloud.calls() == []


def test_launch_warns_of_checkpoints_on_the_workers(cloud: Cloud) -> None:
    (cloud.checkout / "recipes" / "local.yaml").write_text("output_dir: runs/local\n")
    warning = "warning: no output_dir=gs://"
    assert warning in cloud.run("launch", "--dry-run", "recipes/local.yaml").stderr
    assert warning not in cloud.run("launch", "--dry-run", "recipes/local.yaml", "output_dir=gs://b/x").stderr
    assert warning not in cloud.run("launch", "--dry-run", "recipes/big.yaml").stderr


@pytest.mark.slow
def test_logs(cloud: Cloud) -> None:
    cloud.launched(NODE_COUNT="2", behaviour="0")
    wait_for(lambda: cloud.states() == ["exited 0"] * 4)
    cloud.forget_calls()
    told = cloud.run("logs", "--node", "1", "--worker", "1", "--no-follow", "--lines", "50").stdout
    assert "behaviour 0" in told and "exit code 0" in told
    assert cloud.calls()[0][4:7] == ["glm-1", "--worker=1", "--command=tail -n 50  glm45-runs/glm/log"]
    assert "--node is 2, but glm has 2 slice(s)" in cloud.run("logs", "--node", "2", code=1).stderr
    process = cloud.start("logs")
    assert process.stdout is not None
    assert any("exit code 0" in line for line in process.stdout)
    assert process.poll() is None  # it follows
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=20)


@pytest.mark.slow
def test_logs_go_to_a_bucket(cloud: Cloud) -> None:
    cloud.launched("--log-dir", "gs://logs/here", "recipes/big.yaml", behaviour="0")
    wait_for(lambda: cloud.states() == ["exited 0"] * 2)
    copied = sorted((cloud.stub / "bucket" / "logs" / "here" / "glm").iterdir())
    assert [file.name for file in copied] == ["glm.0.log", "glm.1.log"]
    assert "exit code 0" in copied[0].read_text()


# --- delete ----------------------------------------------------------------------------------------------------------


def test_delete(cloud: Cloud) -> None:
    cloud.launched()
    assert "Give --yes" in cloud.run("delete", code=1).stderr
    assert cloud.calls() == []
    cloud.run("delete", "--yes")
    assert cloud.calls() == [["compute", "tpus", "queued-resources", "delete", "glm", "--force", "--quiet", *WHERE]]
    assert not (cloud.state / "my-project.us-east5-a.glm").exists()


@pytest.mark.parametrize(("answer", "deleted"), [("n", False), ("", False), ("y", True)])
def test_delete_asks(cloud: Cloud, answer: str, deleted: bool) -> None:
    cloud.set_world(states=["ACTIVE"])
    ours, theirs = pty.openpty()
    process = cloud.start("delete", stdin=theirs)
    with open(ours, "w") as terminal:
        terminal.write(answer + "\n")
        terminal.flush()
        _, errors = process.communicate(timeout=20)
    assert ("delete" in cloud.steps()) == deleted == (process.returncode == 0)
    assert "v5p-16, my-project, us-east5-a" in errors


def test_delete_tells_that_it_may_still_cost(cloud: Cloud) -> None:
    cloud.set_world(failures=[[["delete"], "INTERNAL", 1]])
    assert "It may still cost" in cloud.run("delete", "--yes", code=1).stderr


# --- all -------------------------------------------------------------------------------------------------------------

COMMANDS = ("create", "setup", "launch", "logs", "status", "stop", "resume", "delete")


def test_dry_run_calls_nothing_and_prints_what_would_be_called(cloud: Cloud) -> None:
    cloud.launched(*HARD, NODE_COUNT="2")
    before = sorted((file, file.read_bytes()) for file in cloud.state.rglob("*") if file.is_file())
    for command in COMMANDS:
        arguments = HARD if command == "launch" else []
        printed = cloud.run(command, "--dry-run", *arguments).stdout
        assert cloud.calls() == [] and printed.startswith("gcloud "), command
    assert before == sorted((file, file.read_bytes()) for file in cloud.state.rglob("*") if file.is_file())


@pytest.mark.slow
def test_what_dry_run_prints_is_what_is_called(cloud: Cloud) -> None:
    """The printed lines, read by a shell, are the calls that change something."""

    def printed(*arguments: str) -> list[list[str]]:
        return [words[1:] for words in read_lines(cloud.run(*arguments).stdout)]

    def called(*arguments: str) -> list[list[str]]:
        cloud.forget_calls()
        cloud.run(*arguments)
        return [call for call in cloud.calls() if "describe" not in call and " status " not in " ".join(call)]

    cloud.set_world(behaviour="0")
    assert printed("create", "--dry-run") == called("create")
    dry, real = printed("setup", "--dry-run"), called("setup")
    assert dry[0][4].endswith("glm45-jax.tar.gz") and dry[0][5:] == real[0][5:] and dry[1:] == real[1:]
    assert printed("launch", "--dry-run", *HARD) == called("launch", *HARD)
    assert printed("stop", "--dry-run") == called("stop")
    assert printed("delete", "--dry-run") == called("delete", "--yes")


def read_lines(text: str) -> list[list[str]]:
    """The commands in a text, as bash reads them ($'…' too, which shlex does not know)."""
    split = subprocess.run(
        ["bash", "-c", 'gcloud() { printf "%s\\0" gcloud "$@"; printf "\\1\\0"; }; eval "$1"', "-", text],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [command.strip("\0").split("\0") for command in split.split("\1\0") if command]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(cloud: Cloud, command: str) -> None:
    told = cloud.run(command, "--help").stdout
    assert f"bash scripts/tpu_vm/{command}.sh" in told and "--dry-run" in told and "#!" not in told
    assert cloud.calls() == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed here")
def test_the_real_gcloud_knows_these_calls(cloud: Cloud) -> None:
    """Where it is installed: every call gets as far as the question who is logged in, and no further."""
    rich = ["--node-count=4", "--capacity=spot", "--valid-until-duration=6h", "--network=n", "--subnetwork=s"]
    runs = [
        ["create", *rich, "--service-account=a@b", "--ssh=internal"],
        ["create", "--accelerator-type=", "--type=v4", "--topology=2x2x4", "--capacity=reserved"],
        *(["setup", "--ssh", ssh] for ssh in ("external", "internal", "iap")),
        ["launch", *HARD],
        ["status"],
        ["logs"],
        ["delete"],
    ]
    found = [call for run in runs for call in read_lines(cloud.run(run[0], "--dry-run", *run[1:]).stdout)]
    # one of each form: the same words, but for the flags' values
    calls = list({tuple(word.partition("=")[0] for word in call): call for call in found}.values())
    environment = {
        **os.environ,
        "CLOUDSDK_CONFIG": str(cloud.cwd / "nobody"),
        "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false",
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
    }
    (cloud.cwd / "glm45-jax.tar.gz").touch()
    for call in [["gcloud", "compute", "tpus", "queued-resources", "create", "glm", "--colour=red"], *calls]:
        done = subprocess.run(call, env=environment, cwd=cloud.cwd, capture_output=True, text=True, timeout=60)
        understood = "--colour=red" not in call
        assert ("You do not currently have an active account" in done.stderr) == understood, (call, done.stderr)

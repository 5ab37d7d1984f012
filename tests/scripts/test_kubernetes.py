"""scripts/kubernetes: the manifests' parts fit each other and the project."""

from __future__ import annotations

import math
import re
import tomllib
from typing import Any

import pytest
import yaml

from tests.support import ROOT

FOLDER = ROOT / "scripts" / "kubernetes"


def load(name: str) -> dict[str, Any]:
    """The objects of a manifest by kind."""
    return {found["kind"]: found for found in yaml.safe_load_all((FOLDER / name).read_text())}


def jobs() -> dict[str, dict[str, Any]]:
    """The specification of the job in each manifest."""
    jobset = load("jobset_tpu.yaml")["JobSet"]
    return {
        "jobset_tpu": jobset["spec"]["replicatedJobs"][0]["template"]["spec"],
        "job_gpu": load("job_gpu.yaml")["Job"]["spec"],
    }


def container(job: dict[str, Any]) -> dict[str, Any]:
    (found,) = job["template"]["spec"]["containers"]
    return found


@pytest.mark.parametrize("name", jobs())
def test_a_job_trains(name: str) -> None:
    """The command is one that glm45 has, of a recipe that there is, and its checkpoints outlive the pod."""
    job = jobs()[name]
    command, recipe, output = container(job)["args"]
    assert command == "train" and (ROOT / recipe).exists()
    mounts = [mount["mountPath"] + "/" for mount in container(job).get("volumeMounts", [])]
    assert output.removeprefix("output_dir=").startswith(("gs://", *mounts))


@pytest.mark.parametrize("name", jobs())
def test_what_ends_a_job(name: str) -> None:
    """SIGTERM leaves time to save; a command that is refused (exit 2) is not tried again, anything else is."""
    job = jobs()[name]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    assert pod["terminationGracePeriodSeconds"] >= 300
    first = job["podFailurePolicy"]["rules"][0]
    assert first["action"] == "FailJob"
    assert first["onExitCodes"] == {"containerName": container(job)["name"], "operator": "In", "values": [2]}


@pytest.mark.parametrize("name", jobs())
def test_hosts_are_numbered_and_run_at_once(name: str) -> None:
    job = jobs()[name]
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"]
    resources = container(job)["resources"]
    assert resources["requests"] == resources["limits"]


def test_a_slice_has_as_many_hosts_as_its_topology() -> None:
    job = jobs()["jobset_tpu"]
    topology = job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(int(n) for n in topology.split("x"))
    assert chips == job["parallelism"] * container(job)["resources"]["limits"]["google.com/tpu"]


def test_a_jobset_starts_anew_as_a_whole() -> None:
    jobset = load("jobset_tpu.yaml")["JobSet"]["spec"]
    assert jobs()["jobset_tpu"]["backoffLimit"] == 0 and jobset["failurePolicy"]["maxRestarts"] > 0
    (rule,) = jobset["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}


def test_the_pods_of_a_job_find_their_coordinator() -> None:
    """Its address is the first pod's name under the headless service, and a port that is open."""
    objects = load("job_gpu.yaml")
    service, job = objects["Service"], objects["Job"]
    name, spec = job["metadata"]["name"], job["spec"]
    environment = {variable["name"]: variable for variable in container(spec)["env"]}
    host, port = environment["GLM45_COORDINATOR"]["value"].split(":")
    assert host == f"{name}-0.{service['metadata']['name']}"
    assert int(port) in [found["containerPort"] for found in container(spec)["ports"]]
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": name}
    assert service["spec"]["publishNotReadyAddresses"]  # the pods look for each other before they are ready
    assert int(environment["GLM45_NUM_PROCESSES"]["value"]) == spec["completions"]
    index = environment["GLM45_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container(spec)["volumeMounts"]} == volumes


def test_the_image_is_built_of_what_there_is() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    for sources in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split())
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {extra for found in re.findall(r"EXTRAS=([a-z,]+)", text) for extra in found.split(",")} <= set(extras)

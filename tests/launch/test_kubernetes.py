"""The manifests and the image of launch/kubernetes, held against schemas and against the code."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe import exit_codes
from moe.config import RunConfig
from moe.config.layout import check_layout
from moe.parallel.cluster import find_cluster, is_restarted

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch" / "kubernetes"
JOBSETS = ("jobset.yaml", "jobset_tpu.yaml")
SCHEMA = json.loads((Path(__file__).parent / "jobset_schema.json").read_text())


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


def replicated_job(name: str) -> dict[str, Any]:
    (found,) = read(name)["spec"]["replicatedJobs"]
    return found


def job_spec(name: str) -> dict[str, Any]:
    return replicated_job(name)["template"]["spec"]


def pod_spec(name: str) -> dict[str, Any]:
    return job_spec(name)["template"]["spec"]


def container(name: str) -> dict[str, Any]:
    (found,) = pod_spec(name)["containers"]
    return found


@pytest.mark.parametrize("name", JOBSETS)
def test_a_jobset_has_only_documented_fields(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="install the extra `test`")
    jsonschema.validate(read(name), SCHEMA)
    wrong = read(name)
    wrong["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        jsonschema.validate(wrong, SCHEMA)


@pytest.mark.parametrize("name", JOBSETS)
def test_the_jobs_are_valid_for_kubernetes(name: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="install the extra `test`")
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "job"},
        "spec": job_spec(name),
    }
    validator.validate(job, "1.33", strict=True)
    pod_spec(name)
    job["spec"]["template"]["spec"]["automountToken"] = False
    with pytest.raises(validator.ValidationError, match="automountToken"):
        validator.validate(job, "1.33", strict=True)


def test_the_claim_is_valid_for_kubernetes() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="install the extra `test`")
    claim = read("runs.yaml")
    validator.validate(claim, "1.33", strict=True)
    (volume,) = [v for v in pod_spec("jobset.yaml")["volumes"] if v["name"] == "runs"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


@pytest.mark.parametrize("name", JOBSETS)
def test_a_pod_can_do_nothing_that_training_does_not_need(name: str) -> None:
    pod, security = pod_spec(name), container(name)["securityContext"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert security == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    resources = container(name)["resources"]
    assert resources["requests"] == resources["limits"]
    assert {"cpu", "memory", "ephemeral-storage"} < resources["limits"].keys()


@pytest.mark.parametrize("name", JOBSETS)
def test_every_path_that_is_written_is_a_volume(name: str) -> None:
    mounts = {mount["mountPath"]: mount["name"] for mount in container(name)["volumeMounts"]}
    assert set(mounts.values()) == {volume["name"] for volume in pod_spec(name)["volumes"]}
    dockerfile = (FOLDER / "Dockerfile").read_text()
    home = re.search(r"HOME=(\S+)", dockerfile)
    assert home and {"/tmp", "/runs", home[1]} <= mounts.keys()
    paths = [
        word for word in container(name)["args"] if re.match(r"--(workdir|.*directory)=", word)
    ]
    assert len(paths) == 2 and all("=/runs/" in word for word in paths)


@pytest.mark.parametrize("name", JOBSETS)
def test_the_grace_period_is_longer_than_a_save(name: str) -> None:
    assert pod_spec(name)["terminationGracePeriodSeconds"] >= 300


@pytest.mark.parametrize("name", JOBSETS)
def test_restarts_follow_the_exit_codes(name: str) -> None:
    job = job_spec(name)
    # The rules of podFailurePolicy need these two.
    assert pod_spec(name)["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    rules = job["podFailurePolicy"]["rules"]
    by_action = {
        (rule["action"], *rule["onExitCodes"]["values"]) for rule in rules if "onExitCodes" in rule
    }
    assert by_action == {
        ("FailJob", exit_codes.BAD_INPUT, exit_codes.DIVERGED, exit_codes.SLOW),
        ("Ignore", exit_codes.INTERRUPTED),
    }
    assert all(
        rule["onExitCodes"]["containerName"] == container(name)["name"]
        for rule in rules
        if "onExitCodes" in rule
    )
    (rule,) = read(name)["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_the_pods_find_their_places_in_the_job() -> None:
    """As find_cluster reads them from what JobSet and Kubernetes set in each pod."""
    jobset, job = read("jobset.yaml"), replicated_job("jobset.yaml")
    annotations = {
        "jobset-name": jobset["metadata"]["name"],
        "replicatedjob-name": job["name"],
        "replicatedjob-replicas": str(job["replicas"]),
        "job-index": "0",
        "restart-attempt": "0",
    }
    environment = {}
    for variable in container("jobset.yaml")["env"]:
        if "value" in variable:
            environment[variable["name"]] = variable["value"]
        else:
            path = variable["valueFrom"]["fieldRef"]["fieldPath"]
            match = re.fullmatch(r"metadata\.annotations\['jobset\.sigs\.k8s\.io/(.*)'\]", path)
            assert match, path
            environment[variable["name"]] = annotations[match[1]]
    pods = job_spec("jobset.yaml")["parallelism"]
    assert job_spec("jobset.yaml")["completions"] == pods
    for index in range(pods):
        cluster = find_cluster(environment | {"JOB_COMPLETION_INDEX": str(index)})
        assert cluster is not None
        assert (cluster.num_processes, cluster.process_id) == (pods * job["replicas"], index)
        assert cluster.coordinator.startswith("train-hosts-0-0.train:")
    assert not is_restarted(environment)


@pytest.mark.parametrize("name", JOBSETS)
def test_a_restarted_job_knows_that_it_is_one(name: str) -> None:
    (variable,) = [v for v in container(name)["env"] if v["name"] == "JOBSET_RESTART_ATTEMPT"]
    path = variable["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['jobset.sigs.k8s.io/restart-attempt']"
    assert is_restarted({"JOBSET_RESTART_ATTEMPT": "2"})


def test_the_tpu_variant_fits_its_topology() -> None:
    selector = pod_spec("jobset_tpu.yaml")["nodeSelector"]
    x, y, z = map(int, selector["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = int(container("jobset_tpu.yaml")["resources"]["limits"]["google.com/tpu"])
    job = job_spec("jobset_tpu.yaml")
    assert job["parallelism"] * chips == x * y * z and job["completions"] == job["parallelism"]


@pytest.mark.parametrize("name", JOBSETS)
def test_the_config_of_a_manifest_fits_its_devices(name: str) -> None:
    limits = container(name)["resources"]["limits"]
    (per_pod,) = (int(n) for resource, n in limits.items() if re.search("gpu|tpu", resource))
    words = [word.removeprefix("--").split("=", 1) for word in container(name)["args"][1:]]
    flags = dict(words)
    config = runpy.run_path(str(ROOT / flags["config"]))["get_config"]()
    for field, value in flags.items():
        if field.startswith("config.mesh."):
            config.mesh[field.removeprefix("config.mesh.")] = int(value)
    run = RunConfig.from_config_dict(config.to_dict())
    slices = replicated_job(name)["replicas"]
    mesh = run.mesh.resolve(per_pod * job_spec(name)["parallelism"] * slices)
    check_layout(run, mesh)
    assert slices == 1 or mesh.data == slices  # only the data axis may span slices


def test_the_image_pins_what_it_installs() -> None:
    pins = (FOLDER / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in pins if not line.startswith("#")}
    normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()
    required = re.findall(r"^([\w-]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert {normal(name) for name in required} <= {normal(name) for name in pinned}
    assert all("==" in line for line in pins if not line.startswith("#"))
    bases = re.findall(r"^FROM (\S+)", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    assert len(set(bases)) == 1 and re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", bases[0])


def test_the_image_holds_the_code_and_runs_without_root() -> None:
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    copied = {line.split()[1] for line in lines if line.startswith("COPY ") and "--" not in line}
    assert {"configs", "kernels", "launch", "moe"} <= copied
    user = pod_spec("jobset.yaml")["securityContext"]["runAsUser"]
    assert [line for line in lines if line.startswith("USER")][-1] == f"USER {user}:{user}"
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[0] == "*" and {f"!{name}" for name in copied if "." not in name} <= set(ignored)

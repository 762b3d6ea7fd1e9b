"""JobSet manifests against the API's own models: a key they do not know is dropped, and so shows."""

import copy

import pytest
import yaml
from launch_cases import CASES

from launch import backends
from launch import spec as spec_lib
from launch.backends import gke, sky

models = pytest.importorskip("kubeflow_trainer_api.models")

JOBSETS = [name for name, spec in CASES.items() if spec.backend == "gke"]


def _manifest(name):
    (file,) = backends.BY_NAME["gke"].render(CASES[name]).files
    return yaml.safe_load(file.text)


def _lost(before, after, path=""):
    """Where `after` lacks something `before` has, or has it otherwise."""
    if isinstance(before, dict):
        for key, value in before.items():
            if not isinstance(after, dict) or key not in after:
                yield f"{path}.{key}"
            else:
                yield from _lost(value, after[key], f"{path}.{key}")
    elif isinstance(before, list):
        if not isinstance(after, list) or len(before) != len(after):
            yield path
        else:
            for number, (old, new) in enumerate(zip(before, after)):
                yield from _lost(old, new, f"{path}[{number}]")
    elif before != after:
        yield f"{path}: {before!r} became {after!r}"


def _round_trip(manifest):
    return models.JobsetV1alpha2JobSet.from_dict(copy.deepcopy(manifest)).to_dict()


@pytest.mark.parametrize("name", JOBSETS)
def test_jobset_survives_the_api_models(name):
    manifest = _manifest(name)
    assert list(_lost(manifest, _round_trip(manifest))) == []


def test_a_misspelt_key_would_show():
    manifest = _manifest(JOBSETS[0])
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    pod["nodeSelectr"] = pod.pop("nodeSelector")
    (lost,) = _lost(manifest, _round_trip(manifest))
    assert lost.endswith(".nodeSelectr")


@pytest.mark.parametrize("name", JOBSETS)
def test_jobset_keeps_the_contract(name):
    spec, manifest = CASES[name], _manifest(name)
    policy = manifest["spec"]["failurePolicy"]
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert policy["maxRestarts"] == spec.retries
    # Each exit code has a Job rule that ends the Job and a JobSet rule that knows its message.
    rules = {
        pattern.split()[4]: rule["action"]
        for rule in policy["rules"]
        for pattern in rule["onJobFailureMessagePatterns"]
    }
    assert rules == {
        **dict.fromkeys(("2", "64"), "FailJobSet"),
        "85": "RestartJobSetAndIgnoreMaxRestarts",
    }
    codes = [r["onExitCodes"]["values"] for r in job["podFailurePolicy"]["rules"]]
    assert sorted(codes) == [[2], [64], [85]]
    assert job["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy demands it
    assert pod["terminationGracePeriodSeconds"] == spec.grace
    (container,) = pod["containers"]
    assert tuple(container["command"]) == spec.command  # exec form: no shell
    per_pod = next(iter(container["resources"]["limits"].values()))
    pods = manifest["spec"]["replicatedJobs"][0]["replicas"] * job["parallelism"]
    assert pods == spec.num_hosts
    assert per_pod * pods == spec.hardware.chips * spec.slices


@pytest.mark.parametrize("name", JOBSETS)
def test_pods_mount_the_bucket_where_the_program_writes(name):
    manifest = _manifest(name)
    template = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    pod = template["spec"]
    (container,) = pod["containers"]
    (given,) = [w for w in container["command"] if w.startswith("run_dir=")]
    points = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    assert given.startswith(f"run_dir={points['bucket']}/")
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(volumes) == set(points)
    csi = volumes["bucket"]["csi"]
    assert csi["driver"] == "gcsfuse.csi.storage.gke.io"
    assert csi["volumeAttributes"]["bucketName"] == "my-bucket"
    # Without it the driver's webhook adds no sidecar, and the mount never comes.
    assert template["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    # On accelerators the defaults are for ever, and 200,000.
    options = csi["volumeAttributes"]["mountOptions"].split(",")
    assert "metadata-cache:ttl-secs:0" in options
    assert "file-system:rename-dir-limit:0" in options


def test_gpu_pods_know_each_other():
    env = {e["name"]: e for e in gke._env(CASES["gke-h100-32"])}
    # <jobset>-<replicated job>-<job>-<pod>.<jobset>, as JobSet names its pods.
    assert env["GVJAX_COORDINATOR"]["value"] == "dpo-1b-hosts-0-0.dpo-1b:8476"
    assert env["GVJAX_NUM_PROCESSES"]["value"] == "4"
    assert "job-completion-index" in str(env["GVJAX_PROCESS_ID"]["valueFrom"])


@pytest.mark.parametrize("name", JOBSETS)
def test_tpu_pods_are_left_to_gke(name):
    if CASES[name].hardware.kind == "tpu":
        assert not any(e["name"].startswith("GVJAX") for e in gke._env(CASES[name]))


def test_pod_host_names_fit():
    spec = CASES["gke-h100-32"]
    longest = f"{'n' * 40}-{gke._replicated_job(spec)}-255-255"
    assert len(longest) <= 63


def test_sky_task_gives_preemptions_to_skypilot():
    task = sky.task(CASES["sky-h100-16-spot"])
    recovery = task["resources"]["job_recovery"]
    assert recovery == {
        "max_restarts_on_errors": 0,
        "recover_on_exit_codes": [spec_lib.PREEMPTED],
    }
    assert task["secrets"] == {"HF_TOKEN": None, "WANDB_API_KEY": None}
    mount = {"source": "gs://my-bucket", "mode": "MOUNT"}
    assert task["file_mounts"] == {"/gcs/my-bucket": mount}
    assert task["num_nodes"] == 2
    assert sky.task(CASES["sky-v6e-16"])["num_nodes"] == 1

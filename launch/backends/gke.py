"""GKE: one JobSet (v1alpha2). Slices are replicas of an Indexed Job with one pod per host.

TPU pods find each other by what GKE puts into their environment. GPU pods get coordinator, count and index as
GVJAX_* settings written here: JAX's own Kubernetes detection would need a service account that may list pods.

Needs a JobSet controller of 0.9 or later for the failure rules by message.
"""

import shlex

import yaml

from launch import bucket
from launch import spec as spec_lib
from launch.plan import Command, File, Plan

SECRET = "gvjax-secrets"
"""The Kubernetes Secret whose keys are the names of the job's secrets."""

_CONTAINER = "main"


def render(spec: spec_lib.JobSpec) -> Plan:
    manifest = yaml.safe_dump(jobset(spec), sort_keys=False, width=120)
    apply = _kubectl(spec, "apply", "--filename=jobset.yaml", why="create the JobSet")
    return Plan(
        title=spec.title(),
        files=(File("jobset.yaml", manifest),),
        steps=(credentials(spec), apply),
        notes=("needs nodes, such as these:", "  " + _node_pool(spec)),
    )


def status(spec: spec_lib.JobSpec) -> Plan:
    steps = (
        credentials(spec),
        _kubectl(spec, "get", "jobset", spec.name, "--output=wide", why="the JobSet"),
        _kubectl(
            *(spec, "get", "pods", f"--selector={_selector(spec)}", "--output=wide"),
            why="its pods",
        ),
    )
    return Plan(title=spec.title("status of"), steps=steps)


def logs(spec: spec_lib.JobSpec) -> Plan:
    return Plan(
        title=spec.title("logs of"), steps=(credentials(spec), first_host_log(spec))
    )


def stop(spec: spec_lib.JobSpec) -> Plan:
    delete = _kubectl(
        *(spec, "delete", "jobset", spec.name, "--ignore-not-found"),
        why="SIGTERM, the grace to checkpoint, then delete",
    )
    return Plan(title=spec.title("stop"), steps=(credentials(spec), delete))


def _node_pool(spec: spec_lib.JobSpec) -> str:
    """How somebody would make the nodes of one slice; the hardware table is where their type stands."""
    hardware = spec.hardware
    words = ["gcloud", "container", "node-pools", "create", f"{spec.name}-0"]
    words += [f"--cluster={spec.cluster}", f"--location={spec.zone}"]
    words += [f"--project={spec.project}", f"--num-nodes={hardware.hosts}"]
    words.append(f"--machine-type={hardware.machine_type}")
    if hardware.kind == "tpu":
        words.append(f"--tpu-topology={hardware.gke_topology}")
    else:
        kind, count = hardware.gke_accelerator, hardware.chips_per_host
        words.append(
            f"--accelerator=type={kind},count={count},gpu-driver-version=latest"
        )
    if spec.spot:
        words.append("--spot")
    each = f" (one for each of {spec.slices} slices)" if spec.slices > 1 else ""
    return shlex.join(words) + each


def credentials(spec: spec_lib.JobSpec) -> Command:
    return Command(
        (
            *("gcloud", "container", "clusters", "get-credentials", spec.cluster),
            f"--location={spec.zone}",
            f"--project={spec.project}",
        ),
        "let kubectl reach the cluster",
    )


def first_host_log(spec: spec_lib.JobSpec) -> Command:
    first = "batch.kubernetes.io/job-completion-index=0,jobset.sigs.k8s.io/job-index=0"
    return _kubectl(
        *(spec, "logs", f"--selector={_selector(spec)},{first}"),
        *("--follow", "--tail=200"),
        why="follow host 0's log",
    )


def _kubectl(spec: spec_lib.JobSpec, *words: str, why: str) -> Command:
    context = f"--context=gke_{spec.project}_{spec.zone}_{spec.cluster}"
    return Command(("kubectl", context, f"--namespace={spec.namespace}", *words), why)


def _selector(spec: spec_lib.JobSpec) -> str:
    return f"jobset.sigs.k8s.io/jobset-name={spec.name}"


def jobset(spec: spec_lib.JobSpec) -> dict:
    """The manifest as a mapping."""
    hardware = spec.hardware
    metadata: dict = {"name": spec.name, "namespace": spec.namespace}
    if spec.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": spec.queue}
    if hardware.kind == "tpu" and hardware.hosts > 1:
        # A slice is a node pool; two jobs in one would each hold half of it.
        topology = "alpha.jobset.sigs.k8s.io/exclusive-topology"
        metadata["annotations"] = {topology: "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {
                "maxRestarts": spec.retries,
                # The first rule that fits decides; what none speaks of restarts and is counted.
                "rules": [
                    {
                        "name": "userError",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                        "onJobFailureMessagePatterns": [
                            _message(code) for code in spec_lib.HOPELESS
                        ],
                    },
                    {
                        "name": "preempted",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                        "onJobFailureMessagePatterns": [_message(spec_lib.PREEMPTED)],
                    },
                ],
            },
            "replicatedJobs": [
                {
                    "name": _replicated_job(spec),
                    "replicas": spec.slices,
                    "template": {"spec": _job(spec)},
                }
            ],
        },
    }


def _message(code: int) -> str:
    """What the Job controller writes when a podFailurePolicy rule met this exit code, as a regular expression."""
    return f"failed with exit code {code} matching"


def _replicated_job(spec: spec_lib.JobSpec) -> str:
    return "slice" if spec.hardware.kind == "tpu" else "hosts"


def _job(spec: spec_lib.JobSpec) -> dict:
    return {
        "parallelism": spec.hardware.hosts,
        "completions": spec.hardware.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": _CONTAINER,
                        "operator": "In",
                        "values": [code],
                    },
                }
                for code in (*spec_lib.HOPELESS, spec_lib.PREEMPTED)
            ]
        },
        "template": _template(spec),
    }


def _template(spec: spec_lib.JobSpec) -> dict:
    if not bucket.of(spec.run_dir):
        return {"spec": _pod(spec)}
    # A second container in the pod mounts the bucket. A file that is being written takes 64 MiB of its memory, of which
    # it would have 256; its CPU carries the checkpoint.
    annotations = {
        "gke-gcsfuse/volumes": "true",
        "gke-gcsfuse/cpu-limit": "4",
        "gke-gcsfuse/memory-limit": "4Gi",
    }
    return {"metadata": {"annotations": annotations}, "spec": _pod(spec)}


def _pod(spec: spec_lib.JobSpec) -> dict:
    hardware = spec.hardware
    resource = "google.com/tpu" if hardware.kind == "tpu" else "nvidia.com/gpu"
    selector = {}
    if hardware.kind == "tpu":
        selector["cloud.google.com/gke-tpu-accelerator"] = hardware.gke_accelerator
        selector["cloud.google.com/gke-tpu-topology"] = hardware.gke_topology
    else:
        selector["cloud.google.com/gke-accelerator"] = hardware.gke_accelerator
    tolerations = [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}]
    if spec.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        tolerations.append(
            {
                "key": "cloud.google.com/gke-spot",
                "operator": "Equal",
                "value": "true",
                "effect": "NoSchedule",
            }
        )
    # `command` in exec form: the program is process 1 and SIGTERM reaches it; a shell would not pass it on.
    container: dict = {
        "name": _CONTAINER,
        "image": spec.image,
        "command": list(spec.command),
    }
    if env := _env(spec):
        container["env"] = env
    ports = [8471, 8080] if hardware.kind == "tpu" else [spec_lib.PORT]
    container["ports"] = [{"containerPort": port} for port in ports]
    container["resources"] = {"limits": {resource: hardware.chips_per_host}}
    volumes = _volumes(spec)
    if volumes:
        container["volumeMounts"] = [
            {"name": volume["name"], "mountPath": point} for point, volume in volumes
        ]
    pod: dict = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": spec.grace,
        "nodeSelector": selector,
        "tolerations": tolerations,
        "containers": [container],
    }
    if volumes:
        pod["volumes"] = [volume for _, volume in volumes]
    return pod


def _volumes(spec: spec_lib.JobSpec) -> list[tuple[str, dict]]:
    """Where what is mounted, beside the image."""
    volumes: list[tuple[str, dict]] = []
    if spec.hardware.kind == "gpu":
        # NCCL talks between local GPUs through shared memory; the default is 64 MiB.
        memory = {"name": "shm", "emptyDir": {"medium": "Memory"}}
        volumes.append(("/dev/shm", memory))
    if name := bucket.of(spec.run_dir):
        attributes = {"bucketName": name, "mountOptions": bucket.csi_options()}
        driver = "gcsfuse.csi.storage.gke.io"
        mount = {"driver": driver, "volumeAttributes": attributes}
        volumes.append((bucket.mount_point(name), {"name": "bucket", "csi": mount}))
    return volumes


def _env(spec: spec_lib.JobSpec) -> list[dict]:
    env: list[dict] = [{"name": k, "value": v} for k, v in spec.env.items()]
    env += [
        {
            "name": name,
            "valueFrom": {"secretKeyRef": {"name": SECRET, "key": name}},
        }
        for name in spec.secrets
    ]
    if spec.hardware.kind == "gpu" and spec.num_processes > 1:
        host = f"{spec.name}-{_replicated_job(spec)}-0-0.{spec.name}"
        index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        env += [
            {"name": "GVJAX_COORDINATOR", "value": f"{host}:{spec_lib.PORT}"},
            {"name": "GVJAX_NUM_PROCESSES", "value": str(spec.num_processes)},
            {
                "name": "GVJAX_PROCESS_ID",
                "valueFrom": {"fieldRef": {"fieldPath": index}},
            },
        ]
    return env

"""What a job may not be: refused, with the value, the rule and a way out, before anything runs."""

import re

import pytest

from launch import spec as spec_lib

GKE = {
    "name": "job",
    "backend": "gke",
    "argv": ("python", "train.py"),
    "accelerator": "v5e-256",
    "run_dir": "gs://bucket/run",
    "project": "p",
    "zone": "us-west4-a",
    "cluster": "c",
    "image": "i",
}
LOCAL = {
    "name": "job",
    "backend": "local",
    "argv": ("python", "train.py"),
    "accelerator": "cpu-8",
    "run_dir": "runs/job",
}
SLURM = {**LOCAL, "backend": "slurm", "accelerator": "h100-32", "run_dir": "/lustre/r"}
TPU_VM = {
    **{k: v for k, v in GKE.items() if k not in ("cluster", "image")},
    "backend": "tpu-vm",
    "setup": ("pip install gvjax",),
}
SKY = {**LOCAL, "backend": "sky", "accelerator": "h100-16", "run_dir": "gs://bucket/r"}
XPK = {**GKE, "backend": "xpk", "run_dir": "/data/r", "shared_mounts": ("/data",)}


@pytest.mark.parametrize(
    ("job", "change", "said"),
    [
        (GKE, {"accelerator": "v5e-200"}, "v5e-128 or v5e-256"),
        (GKE, {"image": ""}, "gke needs --image"),
        (GKE, {"zone": ""}, "gke needs --zone"),
        (GKE, {"project": ""}, "gke needs --project"),
        (GKE, {"cluster": ""}, "gke needs --cluster"),
        (GKE, {"backend": "aws"}, "none of local, tpu-vm"),
        (GKE, {"mesh": {"data": 4, "fsdp": 32}}, "data=8 or fsdp=64 would fit"),
        (GKE, {"mesh": {"data": 3, "fsdp": -1}}, "do not divide by 3"),
        (GKE, {"mesh": {"data": -1, "fsdp": -1}}, "only one mesh axis"),
        (GKE, {"mesh": {"model": 256}}, "'model' is none of data, fsdp, tensor"),
        (GKE, {"mesh": {"data": 0}}, "at least 1"),
        (GKE, {"slices": 2, "mesh": {"tensor": 512}}, "reach beyond one slice"),
        (GKE, {"run_dir": "/home/me/run"}, "use gs://BUCKET/PATH"),
        (GKE, {"run_dir": "gs://"}, "no bucket"),
        (GKE, {"run_dir": "hdfs://x/y"}, "use gs://BUCKET/PATH with tpu-vm or gke"),
        (SKY, {"run_dir": "s3://bucket/r"}, "directories that are renamed"),
        (SLURM, {"run_dir": "gs://bucket/r"}, "slurm mounts no buckets"),
        (LOCAL, {"run_dir": "gs://bucket/r"}, "local mounts no buckets"),
        (XPK, {"run_dir": "gs://bucket/r"}, "xpk storage attach"),
        (XPK, {"run_dir": "/tmp/r"}, "a mount you name with --shared-mount"),
        (GKE, {"run_dir": ""}, "run_dir is missing"),
        (GKE, {"accelerator": "cpu-8"}, "runs on local or slurm"),
        (GKE, {"accelerator": "h200-1"}, "8 or more"),
        (GKE, {"partition": "gpu"}, "no use for --partition"),
        (GKE, {"reserved": True}, "no use for --reserved"),
        (GKE, {"name": "Job_1"}, "lower-case"),
        (GKE, {"name": "j" * 41}, "1 to 40"),
        (GKE, {"argv": ()}, "no program"),
        (GKE, {"retries": -1}, "at least 0"),
        (GKE, {"grace": 0}, "at least 1"),
        (GKE, {"slices": 0}, "at least 1"),
        (GKE, {"env": {"HF_TOKEN": "x"}}, "--secret HF_TOKEN"),
        (GKE, {"env": {"OPENAI_API_KEY": "x"}}, "--secret OPENAI_API_KEY"),
        (GKE, {"secrets": ("hf_12-34",)}, "by name, not by value"),
        (GKE, {"env": {"A": "1"}, "secrets": ("A",)}, "both a setting and a secret"),
        (GKE, {"env": {"A": "1\n2"}}, "one line"),
        (GKE, {"env": {"GVJAX_PROCESS_ID": "1"}}, "set by the launcher"),
        (GKE, {"argv": ("x", "{mesh}")}, "add --mesh"),
        (GKE, {"accelerator": "h100-16", "slices": 2}, "slices are of TPUs"),
        (
            GKE,
            {"accelerator": "h100-16", "mesh": {"tensor": 16}},
            "beyond one host's NVLink",
        ),
        (LOCAL, {"accelerator": "v5e-16"}, "4 hosts"),
        (LOCAL, {"processes": 3}, r"use one of \[1, 2, 4, 8\]"),
        (LOCAL, {"accelerator": "v5e-8", "processes": 8}, "one process for all"),
        (LOCAL, {"workdir": "here"}, "absolute"),
        (SLURM, {"accelerator": "v5e-16"}, "Slurm has no TPUs"),
        (SLURM, {"run_dir": "/tmp/run"}, "--shared-mount"),
        (SLURM, {"run_dir": "run"}, "absolute path"),
        (SLURM, {"processes": 8}, "one process per GPU"),
        (SLURM, {"time_limit": "2 days"}, "24:00:00"),
        (TPU_VM, {"setup": ()}, "a TPU VM comes empty"),
        (TPU_VM, {"run_dir": "/home/me/run"}, "--shared-mount"),
        (TPU_VM, {"accelerator": "h100-8"}, "gke, slurm or sky"),
        (TPU_VM, {"accelerator": "tpu7x-8"}, "only with gke or xpk"),
        (TPU_VM, {"spot": True, "reserved": True}, "exclude each other"),
        (SKY, {"accelerator": "tpu7x-8"}, "SkyPilot has no tpu7x-8"),
        (SKY, {"accelerator": "v6e-8", "image": "i"}, "no container on TPU VMs"),
        (XPK, {"accelerator": "h100-8"}, "with gke"),
    ],
)
def test_bad_job_is_refused(job, change, said):
    spec_lib.JobSpec(**job)  # is good without the change
    with pytest.raises(ValueError, match="nothing was started") as error:
        spec_lib.JobSpec(**{**job, **change})
    assert re.search(said, str(error.value)), str(error.value)


def test_every_problem_is_named_at_once():
    with pytest.raises(ValueError, match="3 problems") as error:
        spec_lib.JobSpec(**{**GKE, "image": "", "zone": "", "run_dir": "runs/x"})
    for said in ("--image", "--zone", "run_dir"):
        assert said in str(error.value)


@pytest.mark.parametrize(
    ("job", "change"),
    [
        (GKE, {"slices": 2, "mesh": {"data": 2, "fsdp": 64, "tensor": 4}}),
        (GKE, {"accelerator": "h100-16", "mesh": {"fsdp": 2, "tensor": 8}}),
        (SLURM, {"run_dir": "/tmp/run", "shared_mounts": ("/tmp",)}),
        (TPU_VM, {"run_dir": "/mnt/nfs/run", "shared_mounts": ("/mnt/nfs",)}),
        (LOCAL, {"run_dir": "/tmp/run"}),
        (GKE, {"env": {"TOKENIZERS_PARALLELISM": "false"}}),
    ],
)
def test_good_job_is_taken(job, change):
    spec_lib.JobSpec(**{**job, **change})


@pytest.mark.parametrize(
    ("job", "processes", "hosts"),
    [
        ({**GKE, "slices": 2}, 128, 128),
        ({**GKE, "accelerator": "h100-32"}, 4, 4),
        (SLURM, 32, 4),
        ({**SLURM, "accelerator": "cpu-4", "processes": 2}, 2, 2),
        ({**LOCAL, "processes": 4}, 4, 1),
    ],
)
def test_process_and_host_counts(job, processes, hosts):
    spec = spec_lib.JobSpec(**job)
    assert (spec.num_processes, spec.num_hosts) == (processes, hosts)


def test_program_is_filled_in():
    argv = ("python", "{name}", "out={run_dir}/{name}", "mesh={mesh}", "{other}")
    spec = spec_lib.JobSpec(**{**GKE, "argv": argv, "mesh": {"data": 4, "fsdp": -1}})
    assert spec.command == (
        *("python", "job", "out=/gcs/bucket/run/job"),
        *("mesh={data: 4, fsdp: 64}", "{other}"),
    )


def test_yaml_round_trip():
    spec = spec_lib.JobSpec(
        **{
            **GKE,
            "mesh": {"data": 4, "fsdp": -1},
            "env": {"A": "yes", "B": "1e-6"},
            "secrets": ("HF_TOKEN",),
            "retries": 0,
            "spot": True,
        }
    )
    assert spec_lib.from_mapping(spec_lib.read(spec_lib.write(spec))) == spec


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("acelerator: v5e-8", "'acelerator' is not a key"),
        ("retries: many", "whole number"),
        ("retries: true", "whole number"),
        ("spot: 'yes'", "true or false"),
        ("env: {A: no}", "quote False"),
        ("name: 8", "quote it"),
        ("mesh: fsdp", "data=2"),
        ("setup: [1]", "list of strings"),
        ("name: x", "the job lacks --backend"),
        ("- x", "must be a mapping"),
        ("a: [", "not YAML"),
    ],
)
def test_bad_job_file(text, said):
    with pytest.raises(ValueError, match=said):
        spec_lib.from_mapping(spec_lib.read(text))


def test_gvjax_takes_the_mesh_that_is_passed_on():
    from gvjax import config

    made = spec_lib.JobSpec(
        **{**GKE, "argv": ("run", "mesh={mesh}"), "mesh": {"fsdp": -1}}
    )
    data: dict = {}
    config.override(data, made.command[1])
    assert config.MeshSection(**data["mesh"]) == config.MeshSection(fsdp=256)

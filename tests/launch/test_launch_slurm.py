"""A real Slurm on this machine: a controller and two nodes, on which both roads are preempted and come back.

Two processes, one a node, do a study of both with `gvjax compare`, and each road by itself with `gvjax run`: DPO, and RLOO
on samples of the policy. Skipped where Slurm is not installed (Debian: slurm-wlm) or somebody else than root asks, whom
slurmd would refuse.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.runner import free_port

ROOT = Path(__file__).parents[2]
NODES = ("127.0.0.2", "127.0.0.3")
"""Names that resolve without anybody's /etc/hosts."""

missing = [name for name in ("slurmctld", "slurmd", "sbatch") if not shutil.which(name)]
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed"),
    pytest.mark.skipif(
        not hasattr(os, "geteuid") or os.geteuid() != 0, reason="slurmd wants root"
    ),
]

# A requeued job waits as long as a credential lives, by default two minutes. The port at which a job's processes meet
# follows from its number, so that clusters which run side by side number theirs from different ones on.
CONF = """\
ClusterName=gvjax
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
FirstJobId={first_job}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=10
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmdSpoolDir={root}/spool.%n
StateSaveLocation={root}/state
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/builtin
SchedulerParameters=sched_min_interval=100000
SelectType=select/linear
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={nodes[0]} NodeAddr={nodes[0]} Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName={nodes[1]} NodeAddr={nodes[1]} Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=spare Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF State=UP
"""


class Cluster:
    """Commands of a running Slurm."""

    def __init__(self, root: Path):
        self.root = root
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(root / "slurm.conf"),
            "GVJAX_LAUNCH_STATE": str(root / "launch"),
            "PYTHONPATH": str(ROOT),
        }

    def __call__(self, *words: str, timeout: float = 120) -> str:
        done = subprocess.run(
            words,
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def state(self, name: str) -> str:
        """PENDING, RUNNING, COMPLETED, ... of the latest job of a name."""
        shown = self("scontrol", "show", "job", "--oneliner")
        lines = [line for line in shown.splitlines() if f"JobName={name} " in line]
        return lines[-1].partition("JobState=")[2].split()[0] if lines else ""

    def until(self, done, what: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                logs = "\n".join(
                    f"== {path.name}\n{path.read_text()[-3000:]}"
                    for path in sorted(self.root.rglob("*.log"))
                )
                raise AssertionError(f"{what}: not within {seconds} s\n{logs}")
            time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    root = tmp_path_factory.mktemp("slurm")
    host, ports = socket.gethostname(), list[int]()
    while len(ports) < 3:
        if (port := free_port()) not in ports:
            ports.append(port)
    for name in ("state", *(f"spool.{node}" for node in NODES)):
        (root / name).mkdir()
    (root / "slurm.conf").write_text(
        CONF.format(
            root=root,
            host=host,
            ports=ports,
            nodes=NODES,
            first_job=1 + os.getpid() % 256 * 16,
        )
    )
    made = Cluster(root)
    commands = [["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in NODES)]
    daemons = [
        subprocess.Popen(
            command,
            env=made.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for command in commands
    ]
    try:

        def ready():
            assert all(daemon.poll() is None for daemon in daemons)
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", ports[0])):
                    return False  # asking would take the client ten seconds
            return made("sinfo", "--noheader", "-o", "%n %t").count("idle") == 2

        made.until(ready, "two idle nodes", 120)
        yield made
    finally:
        # The steps of a job that is still there would outlive the daemons.
        subprocess.run(
            ["scancel", "--me", "--signal=KILL", "--full"],
            env=made.environment,
            timeout=120,
        )
        time.sleep(1)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(timeout=120)


BASE = """\
task: {name: tour, options: {num_nodes: 6, horizon: 4, num_goals: 2}}
model: {embed_dim: 16, num_layers: 1, num_heads: 2, mlp_dim: 32}
mesh: {data: 1, fsdp: -1}
logging: {tensorboard: false, every: 1, sample_every: 0}
checkpoints: {every: 5}
"""
SETTINGS = {
    "sft": "settings: {recipe: sft, steps: 5, batch_size: 16}\n",
    "dpo": "pairs: {count: 32, heldout: 16}\nselect: last\nevaluation: {validation_prompts: 16}\n"
    # Enough that some are left when jax has heard of the signal.
    "settings: {recipe: dpo, steps: 300, batch_size: 16, evaluate_every: 300}\n",
    "rloo": "evaluation: {validation_prompts: 16}\n"
    "settings: {recipe: policy_gradient, algorithm: rloo, steps: 60, prompts_per_step: 4,\n"
    "  samples_per_prompt: 4, evaluate_every: 60, rewards: {reward_model: 0, verifier: {path: gold}}}\n",
}


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """The run directory of a policy to start from."""
    directory = tmp_path_factory.mktemp("sft")
    config = directory / "config.yaml"
    config.write_text(BASE + SETTINGS["sft"])
    subprocess.run(
        [sys.executable, "-m", "gvjax", "run", str(config), f"run_dir={directory}/run"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        check=True,
        capture_output=True,
        timeout=600,
    )
    return directory / "run"


STUDY = """\
study: both roads
seeds: [1]
task: {name: tour, options: {num_nodes: 6, horizon: 4, num_goals: 2}}
model: {embed_dim: 16, num_layers: 1, num_heads: 2, mlp_dim: 32}
logging: {tensorboard: false, every: 1}
sft: {steps: 20, batch_size: 16}
pairs: {count: 32, heldout: 16}
reward: {steps: 20, batch_size: 16, early_stop: true, evaluate_every: 10}
evaluation: {test_prompts: 16, validation_prompts: 16}
arms:
  DPO: {road: offline, settings: {recipe: dpo, steps: 60, batch_size: 16, evaluate_every: 60}}
  RLOO: {road: online, settings: {recipe: policy_gradient, steps: 60, prompts_per_step: 4, samples_per_prompt: 4,
    evaluate_every: 60}}
contrasts: [{a: RLOO, b: best offline, margin: 0.05}]
"""


def launch(cluster: Cluster, verb: str, name: str, config: Path, run_dir: Path) -> None:
    cluster(
        *(sys.executable, "-m", "launch", "launch", "--backend", "slurm"),
        *("--name", name, "--accelerator", "cpu-4", "--processes", "2"),
        *("--run-dir", str(run_dir), "--workdir", str(ROOT), "--grace", "60"),
        *("--shared-mount", str(run_dir.parent), "--partition", "spare"),
        *("--", sys.executable, "-m", "gvjax", verb),
        *(str(config), "run_dir={run_dir}"),
    )


@pytest.mark.parametrize("recipe", ["dpo", "rloo"])
def test_preempted_run_comes_back_to_the_same_numbers(cluster, sft, tmp_path, recipe):
    config = tmp_path / "config.yaml"
    config.write_text(f"{BASE}start: {sft}\n{SETTINGS[recipe]}")
    unbroken, preempted = (
        [json.loads((directory / "result.json").read_text()), _metrics(directory)]
        for directory in done_twice(cluster, "run", recipe, config, "metrics.jsonl")
    )
    assert preempted == unbroken


def test_preempted_study_comes_back_to_the_same_numbers(cluster, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(STUDY)
    # In the first arm, whichever that is.
    under_way = "stages/trial-*/metrics.jsonl"
    unbroken, preempted = done_twice(cluster, "compare", "study", config, under_way)
    stages = sorted(path.name for path in (unbroken / "stages").glob("*-*"))
    assert len(stages) == 5
    for stage in stages:
        ours, theirs = (each / "stages" / stage for each in (preempted, unbroken))
        assert _timeless(ours / "result.json") == _timeless(theirs / "result.json")
        if (theirs / "metrics.jsonl").exists():
            assert _metrics(ours) == _metrics(theirs)
    found, expected = (_timeless(d / "results.json") for d in (preempted, unbroken))
    for name in ("config", "config_hash", "started"):
        # The run directory is another, and so is the time.
        del found[name], expected[name]
    assert found == expected
    assert (preempted / "report.html").exists()


def done_twice(
    cluster: Cluster, verb: str, what: str, config: Path, under_way: str
) -> list[Path]:
    """The directories of a command that nobody disturbed, and of one that was preempted with three lines written.

    Args:
      under_way: a pattern of metrics files.
    """
    directories = {}
    for name in (f"{what}-unbroken", f"{what}-preempted"):
        run_dir = directories[name] = config.parent / name
        launch(cluster, verb, name, config, run_dir)
        if name.endswith("preempted"):
            written = lambda run_dir=run_dir: any(  # noqa: E731
                each.read_text().count("\n") >= 3 for each in run_dir.glob(under_way)
            )
            cluster.until(written, f"{name} under way", 300)
            cluster(
                *("sbatch", "--partition=urgent", "--nodes=2", "--wrap=true"),
                *("--job-name=urgent", "--output=/dev/null"),
            )
        ended = lambda name=name: cluster.state(name) in ("COMPLETED", "FAILED")  # noqa: E731
        cluster.until(ended, f"{name} at its end", 400)
        log = (run_dir / f"{name}.log").read_text()
        assert cluster.state(name) == "COMPLETED", log
        assert ("exit code 85; back into the queue" in log) == name.endswith(
            "preempted"
        )
    assert cluster.state("urgent") == "COMPLETED"
    return list(directories.values())


def _timeless(path: Path):
    """JSON without the seconds that things took."""

    def timeless(value):
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k != "seconds"}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    return timeless(json.loads(path.read_text()))


def _metrics(directory: Path) -> list[dict]:
    """What was logged, times left out."""
    timing = ("time", "second", "share/", "wall")
    return [
        {
            name: value
            for name, value in json.loads(line).items()
            if not any(word in name for word in timing)
        }
        for line in (directory / "metrics.jsonl").read_text().splitlines()
    ]

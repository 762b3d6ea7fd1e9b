"""Plans are what they were; and being pure, are the same twice."""

import pytest
from launch_cases import CASES, GOLDEN, text

from launch import backends, hw
from launch import spec as spec_lib


@pytest.mark.parametrize("name", CASES)
def test_plan_is_as_kept(name):
    kept = (GOLDEN / f"{name}.txt").read_text()
    assert text(CASES[name]) == kept, (
        "the plan changed; if that is meant, run `python tests/launch/launch_cases.py` and read the diff"
    )


def test_no_stale_golden_files():
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_programs_are_given_directories(name):
    """`gvjax run` refuses a bucket's address: what the program reads is where the bucket is mounted."""
    spec = CASES[name]
    (given,) = [word for word in spec.command if word.startswith("run_dir=")]
    assert given.startswith("run_dir=/")
    if spec.run_dir.startswith("gs://"):
        assert given == f"run_dir=/gcs/{spec.run_dir.removeprefix('gs://')}"


def test_every_backend_has_a_case():
    assert {spec.backend for spec in CASES.values()} == set(spec_lib.BACKENDS)
    assert set(backends.BY_NAME) == set(spec_lib.BACKENDS)


_GOOGLE = {"project": "p", "zone": "z"}
_GKE = {**_GOOGLE, "cluster": "c", "image": "i"}
_BUCKET = {"run_dir": "gs://bucket/run"}
_PLACES = {
    "local": {"run_dir": "runs/job"},
    "tpu-vm": {**_GOOGLE, **_BUCKET, "setup": ("true",)},
    "gke": {**_GKE, **_BUCKET},
    "slurm": {"workdir": "/w", "run_dir": "/lustre/run"},
    "sky": _BUCKET,
    "xpk": {**_GKE, "run_dir": "/data/run", "shared_mounts": ("/data",)},
}


@pytest.mark.parametrize("backend", spec_lib.BACKENDS)
def test_every_accelerator_renders_or_is_refused(backend):
    """No third way, such as a KeyError or the word None in a manifest."""
    rendered = 0
    for name in hw.table():
        try:
            spec = spec_lib.JobSpec(
                name="job",
                backend=backend,
                argv=("true",),
                accelerator=name,
                **_PLACES[backend],
            )
        except ValueError as error:
            assert "nothing was started" in str(error)
            continue
        shown = text(spec)
        rendered += 1
        assert "None" not in shown
        assert "null" not in shown.replace("/dev/null", "")
    assert rendered >= 7

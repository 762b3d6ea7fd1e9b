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


def test_every_backend_has_a_case():
    assert {spec.backend for spec in CASES.values()} == set(spec_lib.BACKENDS)
    assert set(backends.BY_NAME) == set(spec_lib.BACKENDS)


_PLACES = {
    "local": {},
    "tpu-vm": {"project": "p", "zone": "z", "setup": ("true",)},
    "gke": {"project": "p", "zone": "z", "cluster": "c", "image": "i"},
    "slurm": {"workdir": "/w"},
    "sky": {},
    "xpk": {"project": "p", "zone": "z", "cluster": "c", "image": "i"},
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
                run_dir="gs://bucket/run",
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

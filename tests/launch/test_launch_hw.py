"""The hardware table: its own arithmetic, and libtpu's word wherever libtpu is installed."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from launch import hw


@pytest.mark.parametrize("row", hw.table().values(), ids=lambda row: row.name)
def test_row_adds_up(row):
    assert row.devices == row.hosts * row.devices_per_host
    if row.kind == "tpu":
        sides = [int(side) for side in row.topology.partition(":")[2].split("x")]
        product = 1
        for side in sides:
            product *= side
        assert row.chips == product
        assert row.gke_topology == row.topology.partition(":")[2]
        # The machine type ends in the chips it has, such as ct5lp-hightpu-4t.
        assert row.machine_type.endswith(f"-{row.chips_per_host}t")
    if row.kind == "gpu" and row.machine_type:
        assert row.machine_type.endswith(f"-{row.chips_per_host}g")


@pytest.mark.parametrize(
    ("name", "devices", "hosts"),
    [
        ("v5e-256", 256, 64),
        ("v5e-8", 8, 1),
        ("v5p-128", 64, 16),  # counts cores
        ("v6e-64", 64, 16),
        ("tpu7x-128", 128, 16),  # two devices a chip
        ("h100-8", 8, 1),
        ("h100-32", 32, 4),
    ],
)
def test_known_sizes(name, devices, hosts):
    row = hw.accelerator(name)
    assert (row.devices, row.hosts) == (devices, hosts)


def test_googles_spelling_is_understood():
    assert hw.accelerator("v5litepod-16") is hw.accelerator("v5e-16")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("v5e-100", "v5e-64 or v5e-128"),
        ("v5p-12288", "v5p-4096"),
        ("v5ee-16", "v5e-16"),
        ("H100x8", "h100-8"),
    ],
)
def test_unknown_name_shows_near_misses(name, near):
    with pytest.raises(ValueError, match=name) as error:
        hw.accelerator(name)
    assert near in str(error.value)


_ASK_LIBTPU = """
import json, sys
from jax.experimental import topologies
answers = {}
for name, topology, bounds, config in json.load(sys.stdin):
    options = {"chips_per_host_bounds": tuple(bounds)}
    if config:
        options["chip_config_name"] = config
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, **options
    ).devices
    answers[name] = [len(devices), len({d.process_index for d in devices})]
print(json.dumps(answers))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
def test_table_agrees_with_libtpu():
    rows = [row for row in hw.table().values() if row.kind == "tpu"]
    question = [[r.name, r.topology, r.host_bounds, r.chip_config] for r in rows]
    # These make libtpu load on a host without TPUs; they also fake a pod, so they are for the subprocess alone.
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-256",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", _ASK_LIBTPU],
        input=json.dumps(question),
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    answers = json.loads(result.stdout.splitlines()[-1])
    assert answers == {row.name: [row.devices, row.hosts] for row in rows}

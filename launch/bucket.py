"""A bucket as a directory: a run is written as files, so `gs://BUCKET/PATH` is mounted by Cloud Storage FUSE.

What a run asks of its file system decides on the options. A checkpoint is made whole by renaming its directory, which is
one operation only in buckets with a hierarchical namespace: in others it fails here, at the start of the run, in place
of being done file by file. And what one host has written the others must see at once, so nothing is remembered about
files; on accelerators Cloud Storage FUSE would by itself remember it for ever.
"""

import re
import shlex

ROOT = "/gcs"
"""Buckets are mounted below it, by their names."""

_RUN_DIR = re.compile(r"gs://([a-z0-9][-_.a-z0-9]+)(/.*)?")

_OPTIONS = {
    "implicit-dirs": None,
    "metadata-cache:ttl-secs": 0,
    "metadata-cache:negative-ttl-secs": 0,
    "file-system:rename-dir-limit": 0,
}
"""By their names in Cloud Storage FUSE's config file; None is a switch."""


def of(run_dir: str) -> str:
    """The name of a run directory's bucket; "" where it is not in one."""
    match = _RUN_DIR.fullmatch(run_dir)
    return match.group(1) if match else ""


def directory(run_dir: str) -> str:
    """Where a run directory is for the program: below ROOT if it is in a bucket."""
    match = _RUN_DIR.fullmatch(run_dir)
    return f"{ROOT}/{match.group(1)}{match.group(2) or ''}" if match else run_dir


def mount_point(bucket: str) -> str:
    return f"{ROOT}/{bucket}"


def csi_options() -> str:
    """As the GKE driver's `mountOptions`."""
    return ",".join(
        name if value is None else f"{name}:{value}" for name, value in _OPTIONS.items()
    )


def mounting(bucket: str) -> list[str]:
    """Shell lines that install Cloud Storage FUSE on Debian or Ubuntu and mount a bucket, where that is not done yet.

    Root mounts it, for users and containers alike.
    """
    flags = []
    for name, value in _OPTIONS.items():
        # `rename-dir-limit` is a flag without its section.
        flag = name.removeprefix("file-system:").replace(":", "-")
        flags.append(f"--{flag}" if value is None else f"--{flag}={value}")
    keyring = "/usr/share/keyrings/cloud.google.asc"
    source = "https://packages.cloud.google.com/apt"
    point = shlex.quote(mount_point(bucket))
    return f"""\
if ! command -v gcsfuse >/dev/null; then
  curl -fsSL {source}/doc/apt-key.gpg | sudo tee {keyring} >/dev/null
  echo "deb [signed-by={keyring}] {source} gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  # A machine that has just started may be installing updates of its own.
  sudo apt-get -o DPkg::Lock::Timeout=600 -q update
  sudo apt-get -o DPkg::Lock::Timeout=600 -q -y install gcsfuse
fi
if ! mountpoint -q {point}; then
  sudo mkdir -p {point}
  sudo gcsfuse -o allow_other --uid="$(id -u)" --gid="$(id -g)" \\
    {" ".join(flags)} {shlex.quote(bucket)} {point}
fi""".splitlines()

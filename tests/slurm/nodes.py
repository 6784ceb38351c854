"""Virtual nodes that crash and come back, and a disk that fills."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

from tests.slurm.cluster import Cluster


def crash(cluster: Cluster, node: str) -> None:
    """End a node as a power failure does: SIGKILL to its slurmd, the job's shells and the trainers, at once. All of
    them, and nothing else, live in the mount namespace that cluster-up.sh gave the slurmd."""
    lines = [line.split() for line in (cluster.base / "pids").read_text().splitlines()]
    daemon = [int(pid) for pid, name in lines if name == f"slurmd.{node}"][-1]
    space = os.readlink(f"/proc/{daemon}/ns/mnt")
    assert space != os.readlink("/proc/self/ns/mnt")
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if os.readlink(process / "ns/mnt") == space:
                os.kill(int(process.name), signal.SIGKILL)


def revive(cluster: Cluster, node: str) -> None:
    """Start the node's slurmd again, as after a reboot."""
    script = 'hostname "$1"; mount --bind "$2/hosts" /etc/hosts; exec slurmd -D -b -N "$1" -f "$2/slurm.conf"'
    with (cluster.base / f"log/slurmd.{node}.out").open("a") as log:
        started = subprocess.Popen(
            ["unshare", "--mount", "--uts", "bash", "-c", script, "_", node, str(cluster.base)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    with (cluster.base / "pids").open("a") as pids:
        pids.write(f"{started.pid} slurmd.{node}\n")


def fill(disk: Path, leave: int = 0) -> None:
    """Use up the free bytes of a file system but for `leave`."""
    with (disk / "ballast").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            room = os.statvfs(disk)
            count = room.f_bavail * room.f_frsize - leave
            if count <= 0:
                return
            file.write(bytes(min(count, 1 << 20)))


def free(disk: Path) -> None:
    (disk / "ballast").unlink()

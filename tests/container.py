# SPDX-License-Identifier: Apache-2.0
"""Images built and run without a container engine, as an engine would build and run them.

buildah executes a Dockerfile on a base image made by debootstrap; namespaces, mounts and chroot run
what comes out: its user, environment and entrypoint, process 1 of its own PID namespace, a network
of its own, no capability, the root file system read-only.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

TOOLS = ("buildah", "debootstrap", "unshare", "nsenter", "setpriv", "ip")
BASE = "docker.io/library/debian:bookworm-slim"
RELEASE = "bookworm"
BUILD_LIMIT_S = 3000

# What a container engine prepares before it starts process 1. $1: root, $2: state directory,
# $3: model directory or nothing; what follows is the command.
PREPARE = r"""
set -eu
root=$1 state=$2 models=$3
shift 3
mount --make-rprivate /
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount -o remount,bind,ro "$root/sys"
mount -t tmpfs -o mode=755,size=64k tmpfs "$root/dev"
for device in null zero full random urandom; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/shm"
mount -t tmpfs -o rw,noexec,nosuid,nodev,mode=1777,size=1g tmpfs "$root/dev/shm"
mount -t tmpfs -o rw,noexec,nosuid,nodev,mode=1777,size=1g tmpfs "$root/tmp"
mount --bind "$state" "$root$STATE"
if [ -n "$models" ]; then
    mount --bind "$models" "$root/models"
    mount -o remount,bind,ro "$root/models"
fi
mount -o remount,bind,ro "$root"
ip link set lo up
exec chroot "$root" "$@"
"""


def why_not() -> str:
    """Why containers cannot be built and run here; empty if they can."""
    if os.geteuid() != 0:
        return "needs root: mounts and namespaces"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}: apt-get install buildah debootstrap iproute2"
    return ""


class Store:
    """Images and containers below one directory, apart from the machine's own.

    Args:
        root: an empty directory on a disk with 20 GB to spare.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "storage.conf"
        self.config.write_text(
            f'[storage]\ndriver = "overlay"\nrunroot = "{root}/run"\ngraphroot = "{root}/images"\n'
        )

    def buildah(self, *args: str, log: IO[str] | None = None) -> str:
        environ = {**os.environ, "CONTAINERS_STORAGE_CONF": str(self.config)}
        result = subprocess.run(
            ["buildah", *args], env=environ, text=True, timeout=BUILD_LIMIT_S,
            stdout=log or subprocess.PIPE, stderr=log or subprocess.PIPE,
        )  # fmt: skip
        if result.returncode:
            output = Path(log.name).read_text()[-4000:] if log else result.stderr
            raise RuntimeError(f"buildah {shlex.join(args)}: {output}")
        return "" if log else result.stdout.strip()

    def make_base(self) -> None:
        """Debian's minimal system, under the name of the image it stands for."""
        tree = self.root / "debian"
        subprocess.run(
            ["debootstrap", "--variant=minbase", RELEASE, str(tree)],
            check=True, stdout=subprocess.DEVNULL, timeout=900,
        )  # fmt: skip
        container = self.buildah("from", "scratch")
        subprocess.run(["cp", "-a", f"{tree}/.", self.buildah("mount", container)], check=True)
        self.buildah("umount", container)
        self.buildah("commit", "--quiet", "--rm", "--format", "docker", container, BASE)
        shutil.rmtree(tree)

    def build(self, context: Path, dockerfile: str, tag: str, *args: str) -> None:
        """``docker build``. The machine's pip settings are mounted, so no script knows of them."""
        mounts = [f"--volume={source}:{target}:ro" for source, target in self._pip_settings()]
        with open(self.root / f"build-{tag}.log", "w") as log:
            self.buildah(
                "bud", "--pull-never", "--layers", "--isolation=chroot", "--format=docker",
                *mounts, *args, f"--file={context / dockerfile}", f"--tag={tag}", str(context),
                log=log,
            )  # fmt: skip

    def _pip_settings(self) -> list[tuple[str, str]]:
        """(path here, path in the container) of pip's settings and the directories they name."""
        listed = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True
        ).stdout
        settings = {}
        for line in listed.splitlines():  # environment variables are listed last and win
            name, _, value = line.partition("=")
            settings[name.rpartition(".")[2]] = value.strip("'\"")
        mounts = {}
        if bundle := settings.get("cert"):
            settings["cert"] = "/run/certificates.crt"
            mounts[bundle] = settings["cert"]
        for name in ("find-links", "index-url", "extra-index-url"):
            for place in settings.get(name, "").split():
                path = re.sub("^file://", "", place)
                if path.startswith("/"):
                    # An index is a directory of links into its neighbours.
                    folder = str(Path(path).parent) if name.endswith("index-url") else path
                    mounts[folder] = folder
        kept = ("cert", "default-timeout", "find-links", "index-url", "extra-index-url")
        file = self.root / "pip.conf"
        lines = [f"{name} = {settings[name]}\n" for name in kept if name in settings]
        file.write_text("[global]\n" + "".join(lines))
        return [(str(file), "/etc/pip.conf"), *mounts.items()]

    def config_of(self, tag: str) -> dict[str, Any]:
        """The part of an image that says how it is run: User, Env, Entrypoint, ..."""
        return json.loads(self.buildah("inspect", "--type=image", tag))["Docker"]["config"]

    def remove(self) -> None:
        self.buildah("umount", "--all")
        self.buildah("rm", "--all")
        shutil.rmtree(self.root)


class Container:
    """``docker run --read-only --cap-drop ALL --network none --tmpfs /tmp`` of an image.

    Args:
        store: where the image is.
        tag: of the image.
        scratch: an empty directory: the state volume and the log go there.
        models: a directory to be seen as /models.
        env: environment variables beside the image's.
    """

    def __init__(
        self, store: Store, tag: str, scratch: Path, models: Path | None = None, **env: str
    ) -> None:
        self.config = store.config_of(tag)
        self.environ = dict(item.split("=", 1) for item in self.config["Env"]) | env
        self.uid, _, self.gid = self.config["User"].partition(":")
        self.store = store
        self.name = store.buildah("from", "--pull-never", tag)
        self.root = Path(store.buildah("mount", self.name))
        self.log_path = scratch / "log"
        self.models = models
        # As an engine does with a fresh volume: owner and mode of the image's directory.
        (self.volume,) = self.config["Volumes"]
        self.state = scratch / "state"
        self.state.mkdir()
        original = (self.root / self.volume.lstrip("/")).stat()
        os.chown(self.state, original.st_uid, original.st_gid)
        self.state.chmod(original.st_mode)
        (self.root / "models").mkdir(exist_ok=True)
        for name in ("hosts", "resolv.conf"):
            shutil.copyfile(f"/etc/{name}", self.root / "etc" / name)
        self.files_before = self.files()
        self.process: subprocess.Popen | None = None

    def _as_user(self, command: list[str]) -> list[str]:
        drop = ["setpriv", "--reuid", self.uid, "--regid", self.gid, "--clear-groups"]
        drop += ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "env", "-i"]
        workdir = ["-C", self.config["WorkingDir"]]
        return [*drop, *workdir, *(f"{k}={v}" for k, v in self.environ.items()), *command]

    def start(self, *args: str) -> None:
        command = self._as_user([*self.config["Entrypoint"], *args])
        unshare = ["unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork"]
        unshare += ["--kill-child=KILL", "sh", "-c", PREPARE, "sh"]
        mounts = [str(self.root), str(self.state), str(self.models or "")]
        with open(self.log_path, "w") as log:
            self.process = subprocess.Popen(
                [*unshare, *mounts, *command],
                env={**os.environ, "STATE": self.volume}, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def pid(self) -> int:
        """Process 1 of the container, by its number here."""
        outer = self.process.pid
        children = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
        return int(children[0])

    def run(self, *command: str, as_root: bool = False) -> subprocess.CompletedProcess[str]:
        """``docker exec``."""
        enter = ["nsenter", "--target", str(self.pid), "--all", "--root", "--wd"]
        inner = list(command) if as_root else self._as_user(list(command))
        return subprocess.run([*enter, *inner], capture_output=True, text=True, timeout=60)

    def is_healthy(self) -> bool:
        """Whether the image's own HEALTHCHECK succeeds now."""
        kind, *command = self.config["Healthcheck"]["Test"]
        assert kind == "CMD", self.config["Healthcheck"]
        return self.run(*command).returncode == 0

    def wait_until_healthy(self, limit_s: float) -> float:
        """Returns the seconds it took."""
        begin = time.monotonic()
        while time.monotonic() < begin + limit_s:
            if self.process.poll() is not None:
                raise RuntimeError(f"ended with {self.process.returncode}:\n{self.log[-4000:]}")
            if self.is_healthy():
                return time.monotonic() - begin
            time.sleep(1)
        raise RuntimeError(f"not healthy after {limit_s} s:\n{self.log[-4000:]}")

    def client(self, code: str) -> subprocess.Popen:
        """Python code of this machine, run where the container's 127.0.0.1 is."""
        enter = ["nsenter", "--target", str(self.pid), "--net"]
        return subprocess.Popen(
            [*enter, sys.executable, "-c", code],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def files(self) -> dict[str, int]:
        """(path: time of change) of everything on the root file system itself."""
        found = {}
        for folder, subfolders, names in os.walk(self.root):
            for name in [*subfolders, *names]:
                path = os.path.join(folder, name)
                found[path] = os.lstat(path).st_mtime_ns
        return found

    def remove(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.store.buildah("umount", self.name)
        self.store.buildah("rm", self.name)

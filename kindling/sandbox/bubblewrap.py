"""Builds bubblewrap's command line: which files, which user and which namespaces a program gets.

    subprocess.Popen([*command(slot, filter_fd), *python])

A program must never see the user's files, installed packages or this project.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path

from kindling.errors import KindlingError

ROOT = Path(__file__).resolve().parents[2]
INSTALL = "sudo apt install bubblewrap (or dnf, pacman, apk add bubblewrap)"


class SandboxError(KindlingError):
    """The sandbox cannot be started, or does not confine programs."""


def own_uid(slot: int) -> int:
    """Return a uid that no other process has, or 0 where this process may not change uids."""
    return 0x40000000 + os.getpid() % 2**20 * 64 + slot if _is_root() else 0


def _is_root() -> bool:
    """Return whether this process can become any user, rather than being root only inside a container.

    Each program then needs its own uid: the kernel does not limit the number of processes of its root user, not even in a user
    namespace. For any other user it counts those in the namespace.
    """
    return os.geteuid() == 0 and str(2**32 - 1) in Path("/proc/self/uid_map").read_text(encoding="ascii").split()


def command(slot: int, filter_fd: int | None) -> list[str]:
    """Return the command that runs what follows it inside the sandbox. Raises SandboxError if bubblewrap is not installed."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise SandboxError(
            f"running generated code must have bubblewrap, but no bwrap is installed; {INSTALL}, or accept its risk with "
            f"--sandbox none"
        )
    words = [bwrap, "--die-with-parent", "--new-session"]
    words += [f"--unshare-{kind}" for kind in ("net", "pid", "ipc", "uts", "cgroup-try")]
    if _is_root():
        words += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        words += ["--unshare-user", "--disable-userns", "--uid", str(1000 + slot), "--gid", str(1000 + slot)]
    if filter_fd is not None:
        words += ["--seccomp", str(filter_fd)]
    return [*words, *_files(Path.cwd()), "--remount-ro", "/", "--chdir", "/", "--"]


@lru_cache
def _files(cwd: Path) -> tuple[str, ...]:
    """Return the part of the command that says which files exist in the sandbox."""
    bound, made = _python_files(), set()
    command = ["--perms", "0755", "--dir", "/dev", "--dev-bind", "/dev/null", "/dev/null"]
    for path in bound:
        for parent in reversed(path.parents[:-1]):  # bwrap would create them readable for root only
            if parent not in made:
                made.add(parent)
                command += ["--perms", "0755", "--dir", str(parent)]
        command += ["--ro-bind", str(path), str(path)]
    for link in ("/lib", "/lib64", "/lib32"):
        if os.path.islink(link):
            command += ["--symlink", os.readlink(link), link]
        elif os.path.isdir(link):
            command += ["--ro-bind", link, link]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for path in _hidden(bound, cwd):
        command += ["--perms", "0755", "--size", "4096", "--tmpfs", str(path), "--remount-ro", str(path)]
    return tuple(command)


def _python_files() -> list[Path]:
    """Return the files and folders that Python and its standard library need, none of them inside another."""
    paths = {Path(interpreter()), Path("/usr/lib"), Path("/usr/lib64"), Path("/usr/lib32")}
    paths |= {Path(sysconfig.get_path("stdlib")).resolve().parent, Path(sys.base_exec_prefix, sys.platlibdir).resolve()}
    paths = {p for p in paths if p.exists()}
    return sorted(p for p in paths if not any(p != other and p.is_relative_to(other) for other in paths))


def interpreter() -> str:
    """Return the real path of this Python, also inside a virtual environment."""
    return os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]  # typeshed does not know it


def _hidden(bound: list[Path], cwd: Path) -> list[Path]:
    """Return the folders inside `bound` that a program must not see: installed packages, this project and `cwd`."""
    # site-packages, and dist-packages of Debian
    hidden = [path.resolve() for folder in bound for path in folder.glob("python*/*-packages")]
    hidden = [path for path in dict.fromkeys([*hidden, ROOT, cwd.resolve()]) if path.is_dir()]
    return [path for path in hidden if any(path.is_relative_to(folder) for folder in bound)]

"""The command line that puts a program into a sandbox of bubblewrap: which files it sees, its user and its namespaces.

    subprocess.Popen([*command(slot, filter_fd), *python])

It must never let a program see a file of the user, a package or this project.
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
    """A sandbox that does not stand, or does not hold."""


def own_uid(slot: int) -> int:
    """Return a uid that nothing else has, or 0 where this process cannot give a program one."""
    return 0x40000000 + os.getpid() % 2**20 * 64 + slot if _is_root() else 0


def _is_root() -> bool:
    """Return whether this process can become any user, and is not only called root in a container.

    It then gives each program a uid that nothing else has, since the kernel does not count the processes of its root, not
    even in a user namespace; of anybody else it counts those in the namespace.
    """
    return os.geteuid() == 0 and str(2**32 - 1) in Path("/proc/self/uid_map").read_text(encoding="ascii").split()


def command(slot: int, filter_fd: int | None) -> list[str]:
    """Return the command before which a program is put in the sandbox."""
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
    """Return the part of the command that says which files there are."""
    bound, made = _python_files(), set()
    command = ["--perms", "0755", "--dir", "/dev", "--dev-bind", "/dev/null", "/dev/null"]
    for path in bound:
        for parent in reversed(path.parents[:-1]):  # which bwrap would make closed to all but root
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
    """Return what the interpreter and its standard library need: files and folders, none inside another."""
    paths = {Path(interpreter()), Path("/usr/lib"), Path("/usr/lib64"), Path("/usr/lib32")}
    paths |= {Path(sysconfig.get_path("stdlib")).resolve().parent, Path(sys.base_exec_prefix, sys.platlibdir).resolve()}
    paths = {p for p in paths if p.exists()}
    return sorted(p for p in paths if not any(p != other and p.is_relative_to(other) for other in paths))


def interpreter() -> str:
    """Return the path of the Python that runs here, without links, also from within a virtual environment."""
    return os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]  # typeshed does not know it


def _hidden(bound: list[Path], cwd: Path) -> list[Path]:
    """Return the folders that a program must not see although they lie inside those: packages, and this project."""
    # site-packages and dist-packages
    hidden = [path.resolve() for folder in bound for path in folder.glob("python*/*-packages")]
    hidden = [path for path in dict.fromkeys([*hidden, ROOT, cwd.resolve()]) if path.is_dir()]
    return [path for path in hidden if any(path.is_relative_to(folder) for folder in bound)]

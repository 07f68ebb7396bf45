"""The system calls that are forbidden in the sandbox, as a seccomp filter.

    bwrap --seccomp FD ...    # FD reads what syscall_filter.program() returns

Namespaces separate a program from the rest of the system. The filter closes what they leave open: the keys of the user who
started it; memory that no limit counts (shared segments, memory files, a tmpfs mounted in a new user namespace); kinds of
sockets without a namespace (vsock); and parts of the kernel that are rarely used and often vulnerable. All sockets are
forbidden, but socket pairs and pipes are not. Limits: it lists what is forbidden, not what is allowed; x86-64 and 64-bit ARM
only.
"""

from __future__ import annotations

import os
import struct

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
# each call's number on x86-64 (asm/unistd_64.h) and on ARM (asm-generic/unistd.h)
CLONE, CLONE3 = (56, 220), (435, 435)
# fmt: off
REFUSED = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440), "kcmp": (312, 272),
    "socket": (41, 198), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "shmget": (29, 194), "shmat": (30, 196), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "io_setup": (206, 0),
    "unshare": (272, 97), "setns": (308, 268), "chroot": (161, 51), "pivot_root": (155, 41), "mount": (165, 40),
    "umount2": (166, 39), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "mount_setattr": (442, 442),
    "fanotify_init": (300, 262), "inotify_init": (253, None), "inotify_init1": (294, 26), "vmsplice": (278, 75),
    "userfaultfd": (323, 282), "perf_event_open": (298, 241), "bpf": (321, 280), "io_uring_setup": (425, 425),
    "personality": (135, 92),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "syslog": (103, 116),
}
# fmt: on
NEW_NAMESPACES = 0x7E020000  # the CLONE_NEW* flags
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # linux/bpf_common.h
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data, linux/seccomp.h
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026


def program(machine: str | None = None) -> bytes | None:
    """Return the filter for a kind of machine (this one by default), or None where the numbers of its calls are not known."""
    machine = machine or os.uname().machine
    if machine not in AUDIT_ARCH:
        return None
    column = list(AUDIT_ARCH).index(machine)
    rows = [  # code, value, the label to jump to if true, and if false; "" is the next row
        (_LOAD, _ARCH, "", ""),
        (_EQUAL, AUDIT_ARCH[machine], "", "kill"),  # in a 32-bit program, calls have other numbers
        (_LOAD, _NUMBER, "", ""),
        (_AT_LEAST, 0x40000000, "refuse", ""),  # and so they have in an x32 program
        (_EQUAL, CLONE3[column], "unknown", ""),  # a filter cannot see its flags; the C library then uses clone
        *((_EQUAL, numbers[column], "refuse", "") for numbers in REFUSED.values() if numbers[column] is not None),
        (_EQUAL, CLONE[column], "", "allow"),
        (_LOAD, _FIRST_ARGUMENT, "", ""),
        (_ANY_BIT, NEW_NAMESPACES, "refuse", "allow"),
    ]
    ends = {"allow": _ALLOW, "refuse": _EPERM, "unknown": _ENOSYS, "kill": _KILL}
    labels = {name: len(rows) + i for i, name in enumerate(ends)}
    rows += [(_RETURN, value, "", "") for value in ends.values()]
    code = b""
    for i, (what, value, yes, no) in enumerate(rows):
        yes_skips, no_skips = (labels[label] - i - 1 if label else 0 for label in (yes, no))
        code += struct.pack("=HBBI", what, yes_skips, no_skips, value)
    return code

"""Isolation of the process in which an answer's program runs: rights, files, system calls and resources.

`code_runner.py` calls `isolate` in its own process before it runs the program. Five layers, all of which work without
root and none of which the process can take back:

- Landlock (Linux 5.13 and later): the standard library and the system's libraries can be read, the program's own folder
  can be read and written, every other file is closed. From Linux 6.12 also signals to other processes.
- seccomp: no socket, no new process, no signal to another process, no change of the attributes of files, none of the
  calls that reach the kernel itself. A program is one process, so nothing of it can outlive it.
- no capabilities: root is a user like any other, and cannot raise its own limits.
- limits of memory, processor time, file size and open files.
- file systems in memory as the program's folder and as /dev/shm, so that their size is limited and they end with the
  process. Where a container forbids namespaces the folder stays on disk, and only the program's time limits what it
  writes; /dev/shm, which others share, is closed then, and with it the locks of `multiprocessing`.

Landlock closes files and seccomp the network; a process that lacks one of them does not run answers. An audit hook of
Python is no layer: a program removes it with `ctypes`. This module runs in a bare interpreter, so that it imports the
standard library alone.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

FILE_BYTES = 16 << 20
"""Largest file that a program may write."""
OPEN_FILES = 64
"""Largest number of open files of a program."""
FOLDER_BYTES, FOLDER_FILES = 64 << 20, 4096
"""Size of the program's folder, and its number of files and folders, where it is in memory."""
_SHARED_MEMORY = "/dev/shm"  # noqa: S108
"""Where the C library keeps semaphores and `multiprocessing` its values: locks between the threads of a program."""
_SHARED_BYTES, _SHARED_FILES = 8 << 20, 256
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SIGKILL = 9
_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_READABLE = (
    *("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo"),
    *("/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/random", "/dev/zero"),
)
"""What a program may read beside the standard library: libraries of its modules, time zones, sources of bytes."""


def isolate(folder: str, *, memory: int, cpu_seconds: int) -> list[str]:
    """Isolate this process, which must have one thread; returns what could not be isolated, with the reason.

    `folder` stays writable; `memory` is bytes of address space. What fails does not stop the rest.
    """
    missing = []
    limit_resources(memory, cpu_seconds)
    writable = [folder]
    with suppress(OSError, AttributeError):
        _enter_namespace()
        _mount_memory(folder, FOLDER_BYTES, FOLDER_FILES)
        os.chdir(folder)
        _mount_memory(_SHARED_MEMORY, _SHARED_BYTES, _SHARED_FILES)
        writable.append(_SHARED_MEMORY)  # only behind its own mount: the system's is shared with other processes
    layers: dict[str, Callable[[], None]] = {
        "rights (prctl)": _give_up_rights,
        "files (Landlock)": lambda: _close_files(writable),
        "network (seccomp)": _close_calls,
    }
    for name, layer in layers.items():
        try:
            layer()
        except (OSError, AttributeError, ValueError) as error:
            missing.append(f"{name}: {error}")
    return missing


def limit_resources(memory: int, cpu_seconds: int) -> None:
    """Limits of this process. A system that does not know one of them goes without it."""
    import resource  # not on Windows

    limits = {"AS": memory, "CPU": cpu_seconds, "FSIZE": FILE_BYTES, "NOFILE": OPEN_FILES, "CORE": 0}
    for name, limit in limits.items():
        # macOS refuses a limit of the address space
        with suppress(AttributeError, OSError, ValueError):
            # a second after SIGXCPU, which says why the process ended, comes SIGKILL
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit + (name == "CPU")))


def _enter_namespace() -> None:
    """Enter a namespace in which what this process mounts is seen by itself alone."""
    user, group = os.getuid(), os.getgid()
    _check(_libc().unshare(_CLONE_NEWUSER | _CLONE_NEWNS), "unshare")
    # the process stays the user that it is, otherwise it could write no file
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _mount_memory(folder: str, size: int, files: int) -> None:
    """Mount a file system in memory over a folder, with a limit of bytes and of files."""
    options, flags = f"size={size},nr_inodes={files},mode=700".encode(), _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    _check(_libc().mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options), "mount")


def _libc() -> ctypes.CDLL:
    if not sys.platform.startswith("linux"):
        raise OSError(f"{platform.system()} has none")
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, call: str) -> int:
    if result < 0:
        raise OSError(f"{call}: {os.strerror(ctypes.get_errno())}")
    return result


def _call(number: int, *arguments: object) -> int:
    """A system call that libc has no function of."""
    libc = _libc()
    libc.syscall.restype = ctypes.c_long
    return int(libc.syscall(ctypes.c_long(number), *arguments))


def _give_up_rights() -> None:
    """The process ends with its parent, gets no rights from set-user-id programs, and loses root's capabilities."""
    libc = _libc()
    _check(libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0), "prctl")
    _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    # version 3 of the header, which two sets of 32 capabilities follow: effective, permitted, inheritable
    header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _check(libc.capset(header, none), "capset")


# --- files: Landlock (https://docs.kernel.org/userspace-api/landlock.html) ---

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_RIGHTS = (
    *("execute", "write_file", "read_file", "read_dir", "remove_dir", "remove_file", "make_char", "make_dir"),
    *("make_reg", "make_sock", "make_fifo", "make_block", "make_sym", "refer", "truncate", "ioctl_dev"),
)
"""Rights of files, by their bit."""
_RIGHTS_BY_VERSION = {1: 13, 2: 14, 3: 15, 4: 15}
"""How many of them a version of Landlock knows; later ones know all."""
_NEVER = frozenset({"execute", "make_char", "make_block", "make_sock", "ioctl_dev"})
"""Not even in the program's own folder."""


def _close_files(writable: Sequence[str]) -> None:
    version = _check(_call(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(1)), "landlock_create_ruleset")
    known = _RIGHTS[: _RIGHTS_BY_VERSION.get(version, len(_RIGHTS))]
    handled = _bits(known)
    # ports that can be bound and connected to (version 4), abstract sockets and signals (version 6): none
    attributes = struct.pack("=QQQ", handled, 0b11, 0b11)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _check(
        _call(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0)),
        "landlock_create_ruleset",
    )
    for path in (*sys.path, *_READABLE, os.path.join(sys.base_prefix, "lib")):
        _allow(ruleset, path, _bits(("read_file", "read_dir")))
    _allow(ruleset, "/dev/null", _bits(("read_file", "write_file")))
    for folder in writable:
        _allow(ruleset, folder, _bits([right for right in known if right not in _NEVER]))
    _check(_call(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint(0)), "landlock_restrict_self")
    os.close(ruleset)


def _bits(rights: Sequence[str]) -> int:
    return sum(1 << _RIGHTS.index(right) for right in rights)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        # O_PATH: the file itself need not be readable now
        file = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # a system without it
    if not os.path.isdir(path):
        rights &= _bits(("read_file", "write_file"))
    rule = struct.pack("=Qi", rights, file)
    result = _call(_ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint(0))
    os.close(file)
    _check(result, f"landlock_add_rule {path}")


# --- system calls: seccomp (man 2 seccomp) ---

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""`AUDIT_ARCH_*` of the machines whose system calls are known here."""
NEWEST_CALL = 450
"""Calls from this number on are answered as unknown: a later kernel's new call could be a way around the table."""
DENIED_CALLS = """
fork 57 - vfork 58 - execve 59 221 execveat 322 281 pidfd_open 434 434 pidfd_getfd 438 438 pidfd_send_signal 424 424
process_mrelease 448 448 ptrace 101 117 kcmp 312 272 process_vm_readv 310 270 process_vm_writev 311 271
process_madvise 440 440 migrate_pages 256 238 move_pages 279 239 tkill 200 130 rt_sigqueueinfo 129 138
rt_tgsigqueueinfo 297 240
socket 41 198 connect 42 203 bind 49 200 listen 50 201 accept 43 202 accept4 288 242 sendmsg 46 211 sendmmsg 307 269
io_uring_setup 425 425 io_uring_enter 426 426 io_uring_register 427 427
chmod 90 - fchmod 91 52 fchmodat 268 53 chown 92 - fchown 93 55 lchown 94 - fchownat 260 54 utime 132 - utimes 235 -
utimensat 280 88 futimesat 261 - setxattr 188 5 lsetxattr 189 6 fsetxattr 190 7 removexattr 197 14 lremovexattr 198 15
fremovexattr 199 16 truncate 76 45
shmget 29 194 shmat 30 196 shmctl 31 195 semget 64 190 semctl 66 191 msgget 68 186 msgctl 71 187 mq_open 240 180
mq_unlink 241 181 memfd_create 319 279 memfd_secret 447 447 add_key 248 217 request_key 249 218 keyctl 250 219
setrlimit 160 164 setpriority 141 140 sched_setparam 142 118 sched_setscheduler 144 119 sched_setaffinity 203 122
sched_setattr 314 274 ioprio_set 251 30
mount 165 40 umount2 166 39 pivot_root 155 41 chroot 161 51 open_tree 428 428 move_mount 429 429 fsopen 430 430
fsconfig 431 431 fsmount 432 432 fspick 433 433 mount_setattr 442 442 unshare 272 97 setns 308 268 bpf 321 280
perf_event_open 298 241 userfaultfd 323 282 seccomp 317 277 personality 135 92 init_module 175 105
finit_module 313 273 delete_module 176 106 kexec_load 246 104 kexec_file_load 320 294 reboot 169 142 swapon 167 224
swapoff 168 225 sethostname 170 161 setdomainname 171 162 settimeofday 164 170 clock_settime 227 112
clock_adjtime 305 266 adjtimex 159 171 acct 163 89 quotactl 179 60 quotactl_fd 443 443 syslog 103 116 sync 162 81
syncfs 306 267 vhangup 153 58 fanotify_init 300 262 fanotify_mark 301 263 name_to_handle_at 303 264
open_by_handle_at 304 265 iopl 172 - ioperm 173 - modify_ldt 154 - uselib 134 -
"""
"""Name and numbers (x86_64, aarch64) of calls that are denied whatever their arguments: processes and what reads or
signals them, sockets and io_uring (which would open sockets past this filter), attributes of files (which Landlock does
not know), what outlives a process or is no file (shared memory, queues, keys), limits, and the kernel itself."""
CHECKED_CALLS = """
clone 56 220 clone3 435 435 kill 62 129 tgkill 234 131 prlimit64 302 261 sendto 44 206 socketpair 53 199 prctl 157 167
open 2 - openat 257 56 openat2 437 437 fcntl 72 25 ioctl 16 29
"""
"""Calls that depend on their arguments, or that the C library replaces by others where they are unknown."""
_EPERM, _ENOSYS = 0x0005_0001, 0x0005_0026
_ALLOW, _KILL = 0x7FFF_0000, 0x8000_0000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_CLONE_THREAD, _O_TRUNC, _O_ACCMODE, _AF_UNIX, _SOCK_STREAM, _TYPE_MASK = 0x10000, 0x200, 0x3, 1, 1, 0xF
_SETOWN_COMMANDS = (8, 10, 15)
"""`F_SETOWN`, `F_SETSIG`, `F_SETOWN_EX`: the kernel would send any signal to any process when a file is ready."""
_SETOWN_IOCTLS = (0x8901, 0x8902)
"""`FIOSETOWN`, `SIOCSPGRP`: the same."""

Instruction = tuple[int, int, int, int]


def parse_calls(table: str, machine: str) -> dict[str, int]:
    """Numbers of the calls of a table on a machine; calls that it does not have are left out."""
    words, column = table.split(), 1 + list(ARCHITECTURES).index(machine)
    rows = (words[i : i + 3] for i in range(0, len(words), 3))
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


def _close_calls() -> None:
    machine = platform.machine()
    if machine not in ARCHITECTURES or sys.maxsize < 2**32:
        raise OSError(f"the system calls of {machine} are not known")
    instructions = list(_filter(machine, os.getpid()))
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(instructions), ctypes.addressof(buffer))
    _check(_libc().prctl(_PR_SET_SECCOMP, 2, program, 0, 0), "seccomp")


def _filter(machine: str, pid: int) -> Iterator[Instruction]:
    """The filter in classic BPF. `seccomp_data` is nr (4 bytes), arch (4), instruction pointer (8), 6 arguments (8)."""
    yield from (_load(4), (_EQUAL, 1, 0, ARCHITECTURES[machine]), _give(_KILL))
    # the second interface of x86_64 (x32) has numbers far above this
    yield from (_load(0), (_AT_LEAST, 0, 1, NEWEST_CALL), _give(_ENOSYS))
    for number in parse_calls(DENIED_CALLS, machine).values():
        yield from ((_EQUAL, 0, 1, number), _give(_EPERM))
    numbers = parse_calls(CHECKED_CALLS, machine)
    for name, block in _argument_checks(pid).items():
        if name in numbers:
            # a block always returns, so what follows still has the number loaded
            yield from ((_EQUAL, 0, len(block), numbers[name]), *block)
    yield _give(_ALLOW)


def _argument_checks(pid: int) -> dict[str, list[Instruction]]:
    allow, deny = _give(_ALLOW), _give(_EPERM)
    truncates = (_AND, 0, 0, _O_TRUNC | _O_ACCMODE), (_EQUAL, 0, 1, _O_TRUNC), deny, allow
    return {
        # threads alone
        "clone": [_argument(0), (_ANY_BIT, 1, 0, _CLONE_THREAD), deny, allow],
        # flags in memory cannot be read here; the C library then takes `clone` and `openat`
        "clone3": [_give(_ENOSYS)],
        "openat2": [_give(_ENOSYS)],
        # the process itself, or (0) its group, in which it is alone
        "kill": [_argument(0), (_EQUAL, 2, 0, pid), (_EQUAL, 1, 0, 0), deny, allow],
        "tgkill": [_argument(0), (_EQUAL, 1, 0, pid), deny, allow],
        # limits may be read
        "prlimit64": [*_all_zero(2), _argument(0), (_EQUAL, 2, 0, pid), (_EQUAL, 1, 0, 0), deny, allow],
        # pairs of connected sockets, which asyncio needs, reach nobody
        "socketpair": [
            *(_argument(0), (_EQUAL, 1, 0, _AF_UNIX), deny),
            *(_argument(1), (_AND, 0, 0, _TYPE_MASK), (_EQUAL, 1, 0, _SOCK_STREAM), deny, allow),
        ],
        # without an address
        "sendto": [*_all_zero(4), allow],
        "prctl": [_argument(0), (_EQUAL, 0, 1, _PR_SET_PDEATHSIG), deny, allow],
        # opened for reading alone and truncated, which Landlock before version 3 takes for reading
        "open": [_argument(1), *truncates],
        "openat": [_argument(2), *truncates],
        "fcntl": [_argument(1), *((_EQUAL, 3 - i, 0, c) for i, c in enumerate(_SETOWN_COMMANDS)), allow, deny],
        "ioctl": [_argument(1), *((_EQUAL, 2 - i, 0, c) for i, c in enumerate(_SETOWN_IOCTLS)), allow, deny],
    }


def _load(offset: int) -> Instruction:
    return _LOAD, 0, 0, offset


def _give(verdict: int) -> Instruction:
    return _RETURN, 0, 0, verdict


def _argument(index: int) -> Instruction:
    """Load the low half of an argument; both machines are little-endian."""
    return _load(16 + 8 * index)


def _all_zero(index: int) -> tuple[Instruction, ...]:
    """Deny unless a pointer is null."""
    offset = 16 + 8 * index
    return (
        *(_load(offset), (_EQUAL, 1, 0, 0), _give(_EPERM)),
        *(_load(offset + 4), (_EQUAL, 1, 0, 0), _give(_EPERM)),
    )

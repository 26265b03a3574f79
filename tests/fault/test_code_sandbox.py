"""Hostile programs as answers: what each of them tries fails, and nothing of it remains.

Every test asserts what happened; the fixture `programs` asserts afterwards that no process and no file is left.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rung.config.code import CodeLimitsConfig
from rung.errors import PlanError
from rung.scoring import code_runner, code_sandbox
from rung.scoring.code_sandbox import Program, ProgramResult, remove_folder, require_isolation, run_program
from sandboxes import needs_isolation

pytestmark = needs_isolation
SHORT = 0.6
"""Seconds of a program that never ends by itself."""


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the programs' folders. After the test it is empty, and no process has it in its environment."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == [] and processes_of(folder) == []


def processes_of(folder: Path) -> list[str]:
    """Living processes that were started for a program in the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            has_it = str(folder).encode() in (process / "environ").read_bytes()
            if has_it and "\nState:\tZ" not in (process / "status").read_text():
                found.append(process.name)
        except OSError:  # it has ended, or is another user's
            continue
    return found


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of the user's with a file in it, which must both stay as they are."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "mine.txt").write_text("secret")
    (folder / "mine.txt").chmod(0o640)
    os.utime(folder / "mine.txt", (1, 1))
    return folder


def is_untouched(folder: Path) -> bool:
    file = folder / "mine.txt"
    status = file.stat()
    is_same = file.read_text() == "secret" and status.st_mode & 0o777 == 0o640 and status.st_mtime == 1
    return is_same and status.st_nlink == 1 and [path.name for path in folder.iterdir()] == ["mine.txt"]


def run(source: str, tests: str = "", *, seconds: float = 30.0, memory: int = 1024) -> ProgramResult:
    return run_program(Program(source, tests), CodeLimitsConfig(timeout_seconds=seconds, memory_mib=memory))


def denied(attempt: str, errors: str = "PermissionError") -> str:
    """A program that passes exactly if the attempt raises one of these errors."""
    return f"try:\n    {attempt}\nexcept ({errors},):\n    pass\nelse:\n    raise SystemExit('it worked')"


SYSCALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def refused(*arguments):
    result = libc.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    assert result == -1 and ctypes.get_errno() in (1, 13, 38), (arguments, result, ctypes.get_errno())
"""
X86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86_64")


def test_programs_that_are_right_wrong_or_broken() -> None:
    """The baseline without which every refusal below could be a sandbox in which nothing works."""
    assert run("def f(x): return x + 1", "assert f(1) == 2").passed
    wrong = run("def f(x): return x", "assert f(1) == 2")
    assert wrong.reason == "failed" and "assert f(1) == 2" in wrong.detail
    broken = run("def f(x): return 1 / 0", "assert f(1) == 2")
    assert broken.reason == "error" and "ZeroDivisionError" in broken.detail and "code_runner" not in broken.detail
    assert run("def f(x) return x").reason == "error"


def test_what_honest_programs_need_works(programs: Path) -> None:
    source = """
import asyncio, concurrent.futures, dataclasses, decimal, os, pickle, tempfile, threading, zoneinfo
@dataclasses.dataclass
class Point: x: int
async def one(): return 1
def f():
    with concurrent.futures.ThreadPoolExecutor(4) as pool: assert list(pool.map(abs, [-1, 2])) == [1, 2]
    with open('a.txt', 'w') as file: file.write('b')
    os.mkdir('d'); os.rename('a.txt', 'd/a.txt')
    with tempfile.NamedTemporaryFile('w') as file: file.write('x')
    assert os.getcwd() == os.environ['HOME'] == os.environ['TMPDIR']
    return pickle.loads(pickle.dumps(Point(asyncio.run(one()))))
"""
    assert (result := run(source, "assert f() == Point(1)")).passed, result


LOCKS = {
    "threads": "import threading\nwith threading.Lock(), threading.RLock(), threading.Semaphore(2): pass",
    "flock": "import fcntl\nwith open('a', 'w') as file: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
    "lockf": "import fcntl\nwith open('a', 'w') as file: fcntl.lockf(file, fcntl.LOCK_EX)",
    "temporary": "import fcntl, tempfile\nwith tempfile.TemporaryFile() as file: fcntl.flock(file, fcntl.LOCK_SH)",
    "folder": "import fcntl, os\nfcntl.flock(os.open('.', os.O_RDONLY), fcntl.LOCK_EX)",
    "sqlite": "import sqlite3\nwith sqlite3.connect('a.db') as base: base.execute('create table t (x)')",
}
"""Locks of a program that is alone: threads and files in its folder."""
SHARED = {
    "lock": "with multiprocessing.Lock(), multiprocessing.Semaphore(2): pass",
    "value": "value = multiprocessing.Value('i', 3)\nwith value.get_lock(): assert value.value == 3",
    "queue": "queue = multiprocessing.SimpleQueue(); queue.put(1); assert queue.get() == 1",
    "threads": "import multiprocessing.pool\nassert multiprocessing.pool.ThreadPool(2).map(abs, [-1, 2]) == [1, 2]",
}
"""Locks of processes, which are files of shared memory, between the threads of a program."""


@pytest.mark.parametrize("lock", LOCKS)
def test_locks_of_threads_and_files_work(lock: str) -> None:
    assert (result := run(LOCKS[lock])).passed, result


@pytest.mark.parametrize("lock", SHARED)
def test_locks_of_processes_work_between_threads(lock: str, tmp_path: Path) -> None:
    if not may_mount(tmp_path):
        pytest.skip("namespaces are forbidden here: shared memory is closed")
    fork = "import multiprocessing\nmultiprocessing.set_start_method('fork')\n"
    assert (result := run(fork + SHARED[lock])).passed, result


def test_who_denied_what_is_said() -> None:
    """A `PermissionError` of a pool of processes named no file and no reason."""
    for source in ("import multiprocessing\nmultiprocessing.Pool(2)", "open('/etc/passwd')", "import os\nos.fork()"):
        result = run(source)
        assert result.reason == "error" and "PermissionError" in result.detail, result
        assert result.detail.endswith(code_runner.DENIED), result
    assert code_runner.DENIED not in run("raise ValueError").detail


def test_shared_memory_is_that_of_the_program_alone(tmp_path: Path) -> None:
    """What others keep there is neither seen nor changed, and what a program writes there ends with it."""
    host = Path("/dev/shm")  # noqa: S108
    if not host.is_dir():
        pytest.skip("this system has no shared memory")
    canary, mine = host / f".rung-canary-{os.getpid()}", host / f".rung-mine-{os.getpid()}"
    mine.write_text("secret")
    try:
        reading = run(f"import os\n{denied(f'open({str(mine)!r}).read()', 'PermissionError, FileNotFoundError')}")
        writing = run(
            f"open({str(canary)!r}, 'w').write('x')\nimport os\nassert os.listdir('/dev/shm') == ['{canary.name}']"
        )
        flood = run(f"with open({str(canary)!r}, 'wb') as file:\n    for _ in range(15): file.write(b'x' * (1 << 20))")
        assert reading.passed and mine.read_text() == "secret" and not canary.exists(), reading
    finally:
        mine.unlink()
        canary.unlink(missing_ok=True)
    if may_mount(tmp_path):
        assert writing.passed and flood.reason == "error" and "No space left" in flood.detail, (writing, flood)
    else:
        assert "PermissionError" in writing.detail and "PermissionError" in flood.detail, (writing, flood)


def test_the_order_of_sets_is_the_same_in_every_run() -> None:
    """Otherwise a score would depend on it: some programs pass only by the order of a set."""
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    value = subprocess.check_output([sys.executable, "-c", "print(hash('a'))"], env=environment, text=True)
    assert run("", f"assert hash('a') == {value}").passed


# --- files ---


@pytest.mark.parametrize(
    "attempt",
    [
        "open('{outside}/new', 'w')",
        "open('../outside-new', 'w')",
        "os.symlink('{outside}', 'link') or open('link/new', 'w')",
        "open('/tmp/{canary}', 'w')",
        "open('{home}/{canary}', 'w')",
        "open('{outside}/mine.txt', 'a')",
        "open('{outside}/mine.txt').read()",
        "os.open('{outside}/mine.txt', os.O_RDONLY | os.O_TRUNC)",
        "os.truncate('{outside}/mine.txt', 0)",
        "os.unlink('{outside}/mine.txt')",
        "os.rename('{outside}/mine.txt', 'mine')",
        "os.rename('{outside}/mine.txt', '{outside}/other')",
        "os.link('{outside}/mine.txt', 'mine')",
        "os.chmod('{outside}/mine.txt', 0o777)",
        "os.chown('{outside}/mine.txt', 1, 1)",
        "os.utime('{outside}/mine.txt', (2, 2))",
        "os.setxattr('{outside}/mine.txt', 'user.x', b'1')",
        "os.listdir('{outside}')",
        "os.mkfifo('{outside}/pipe')",
        "os.chroot('.')",
        "open('/etc/passwd')",
        "open(os.__file__, 'a')",
    ],
)
def test_files_outside_stay_as_they_are(attempt: str, outside: Path) -> None:
    # another file system, or Landlock from its second version on: EXDEV
    errors = "OSError" if "'mine')" in attempt else "PermissionError"
    canary, home = f".rung-canary-{os.getpid()}", Path.home()
    result = run("import os\n" + denied(attempt.format(outside=outside, home=home, canary=canary), errors))
    written = [file for folder in ("/tmp", home) if (file := Path(folder, canary)).exists()]  # noqa: S108
    for file in written:
        file.unlink()
    assert result.passed and is_untouched(outside) and not written, result


def test_secrets_of_the_environment_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RUNG_API_KEY", "OPENAI_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "sk-secret")
    source = f"""
import os
assert not any('sk-secret' in value for value in os.environ.values()), os.environ
assert set(os.environ) <= {{'HOME', 'TMPDIR', 'PATH', 'LANG', 'LC_CTYPE', 'PYTHONHASHSEED', 'LD_LIBRARY_PATH'}}
{denied("open(f'/proc/{os.getppid()}/environ', 'rb').read()")}
{denied("open('/proc/self/environ', 'rb').read()")}
"""
    assert (result := run(source)).passed, result


# --- network ---


@pytest.mark.parametrize("kind", ["tcp", "udp", "unix"])
def test_a_server_on_this_machine_sees_nothing(kind: str, tmp_path: Path) -> None:
    family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM) as server:
        server.bind(str(tmp_path / "s") if kind == "unix" else ("127.0.0.1", 0))
        server.settimeout(0.2)
        if kind != "udp":
            server.listen()
        address = server.getsockname()
        send = f"s.sendto(b'x', {address!r})" if kind == "udp" else f"s.connect({address!r})"
        arguments = f"socket.{family.name}, socket.SOCK_{'DGRAM' if kind == 'udp' else 'STREAM'}"
        result = run("import socket\n" + denied(f"s = socket.socket({arguments}); {send}"))
        assert result.passed, result
        with pytest.raises(TimeoutError):
            server.recvfrom(1) if kind == "udp" else server.accept()


def test_no_name_is_looked_up_and_no_pair_of_sockets_reaches_out() -> None:
    source = "import socket\n" + denied("socket.getaddrinfo('example.org', 80)", "OSError")
    source += "\n" + denied("socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)")
    source += "\n" + denied("socket.socketpair()[0].sendto(b'x', '/dev/log')", "OSError")
    assert (result := run(source)).passed, result


# --- processes ---


def test_a_fork_bomb_has_no_second_process(programs: Path) -> None:
    """A child would end at once: a sandbox that fails must not take the machine along."""
    source = f"""
import os, subprocess
{denied("os.fork() or os._exit(0)")}
{denied("subprocess.run(['/bin/true'])")}
{denied("os.posix_spawn('/bin/true', ['true'], {})")}
{denied("os.execv('/bin/true', ['true'])")}
"""
    assert (result := run(source)).passed, result


def test_a_grandchild_cannot_live_on(outside: Path) -> None:
    """Forked twice with a session of its own, it would write when everybody has forgotten it."""
    source = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(0.3)
        open('{outside}/late', 'w').write('x')
        open(os.environ['HOME'] + '/late', 'w').write('x')
    os._exit(0)
"""
    result = run(source)
    assert result.reason == "error" and "PermissionError" in result.detail
    time.sleep(0.5)
    assert is_untouched(outside)


def test_many_threads_end_at_the_memory_limit_and_with_the_process() -> None:
    source = """
import threading, time
try:
    for _ in range(100_000):
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
except (RuntimeError, MemoryError):
    pass
"""
    assert run(source, memory=256).reason in ("passed", "memory", "error")


@pytest.mark.parametrize("target", ["os.getppid()", "-1", "1", "-os.getppid()"])
@pytest.mark.parametrize("call", ["os.kill", "os.killpg", "signal.pidfd_send_signal"])
def test_the_parent_cannot_be_killed(call: str, target: str) -> None:
    """Signal 0, which only asks for the right: a sandbox that fails must not take the machine along."""
    if call == "signal.pidfd_send_signal":
        attempt = f"signal.pidfd_send_signal(os.pidfd_open(abs({target})), 0)"
    else:
        attempt = f"{call}({target if call == 'os.kill' else f'abs({target})'}, 0)"
    assert (result := run("import os, signal\n" + denied(attempt))).passed, result


def test_the_parent_is_neither_read_nor_written_nor_limited() -> None:
    pid = os.getpid()
    attempts = [
        *(f"open('/proc/{pid}/{name}', 'rb')" for name in ("mem", "maps", "environ", "cmdline")),
        *(f"os.open('/proc/{pid}/fd/{number}', os.O_WRONLY)" for number in range(3)),
        f"os.pidfd_open({pid})",
        f"resource.prlimit({pid}, resource.RLIMIT_NOFILE, (3, 3))",
        f"os.setpriority(os.PRIO_PROCESS, {pid}, 19)",
        f"os.sched_setaffinity({pid}, {{0}})",
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        f"fcntl.fcntl(0, fcntl.F_SETOWN, {pid})",
    ]
    errors = "PermissionError, ValueError"  # ValueError: resource's own for a limit that may not rise
    source = "import fcntl, os, resource\n" + "\n".join(denied(attempt, errors) for attempt in attempts)
    assert (result := run(source)).passed, result


@X86
def test_system_calls_around_the_libraries() -> None:
    pid = os.getpid()
    source = f"""
refused(101, 16, {pid}, 0, 0)                   # ptrace attach
refused(310, {pid}, 0, 0, 0, 0, 0)              # process_vm_readv
refused(311, {pid}, 0, 0, 0, 0, 0)              # process_vm_writev
refused(425, 8, 0)                              # io_uring_setup
refused(435, ctypes.create_string_buffer(88), 88)  # clone3
refused(57)                                     # fork
refused(56, 17, 0, 0, 0, 0)                     # clone without CLONE_THREAD
refused(272, 0x10000000)                        # unshare CLONE_NEWUSER
refused(165, b'none', b'.', b'tmpfs', 0, 0)     # mount
refused(321, 0, 0, 0)                           # bpf
refused(29, 1, 4096, 0o1600)                    # shmget
refused(319, b'x', 0)                           # memfd_create
refused(304, -100, 0, 0)                        # open_by_handle_at
refused(157, 1, 0, 0, 0, 0)                     # prctl PR_SET_PDEATHSIG
refused(437, -100, b'/etc/passwd', 0, 24)       # openat2
refused(463, 0, 0, 0)                           # setxattrat, newer than the table
refused(0x40000000 + 41, 2, 1, 0)               # socket of the x32 interface
"""
    assert (result := run(SYSCALL + source)).passed, result


@X86
def test_the_32_bit_entry_into_the_kernel_ends_the_process() -> None:
    """`int 0x80` has other numbers: 359 is socket there, of which a filter of 64-bit numbers knows nothing."""
    source = """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(b'\\xb8\\x67\\x01\\x00\\x00\\xcd\\x80\\xc3')
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
"""
    result = run(source)
    assert result.reason == "exited" and result.detail.endswith("signal 31")  # SIGSYS


# --- limits ---


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time\nwhile True: time.sleep(1000)",
        "import signal, time\nfor s in (1, 2, 3, 14, 15, 24): signal.signal(s, signal.SIG_IGN)\ntime.sleep(1000)",
        "import threading\nthreading.Event().wait()",
        "10 ** 10 ** 9",
        "import os\nwhile True: os.write(1, b'x' * 65536); print('y' * 65536)",
        "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
        "import sys\nsys.setswitchinterval(1000)\nx = [0] * 10 ** 6\nwhile True: x.sort()",
    ],
    ids=["loop", "sleep", "signals ignored", "wait", "power", "output", "error that never prints", "sort"],
)
def test_what_never_ends_is_killed_at_the_deadline(source: str) -> None:
    start = time.monotonic()
    assert run(source, seconds=SHORT).reason == "timeout"
    assert time.monotonic() - start < SHORT + 10.0


def test_a_program_that_only_seems_to_end(programs: Path) -> None:
    """It closes all its files, the pipe of the report among them, and goes on."""
    result = run("import os\nos.closerange(0, 1000)\nwhile True: pass")
    assert result.reason == "exited" and result.seconds < 5.0


@pytest.mark.parametrize("source", ["x = bytearray(4 << 30)", "x = []\nwhile True: x.append(' ' * 10 ** 6)"])
def test_memory_is_limited(source: str) -> None:
    assert run(source, memory=256).reason == "memory"


FLOODS = {
    "bytes": "for i in range(10 ** 6):\n    with open(str(i), 'wb') as file: file.write(b'x' * (8 << 20))",
    "files": "for i in range(10 ** 6): open(str(i), 'w').close()",
    "folders": "for i in range(10 ** 6): os.mkdir('d'); os.chdir('d')",
}


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_of_files_ends_with_its_folder(flood: str, tmp_path: Path) -> None:
    if not may_mount(tmp_path):
        pytest.skip("namespaces are forbidden here: the folder is on disk")
    result = run("import os\n" + FLOODS[flood])
    assert result.reason == "error" and "No space left on device" in result.detail, result


def may_mount(folder: Path) -> bool:
    """Whether a process here may mount a file system in namespaces of its own."""
    script = "import ctypes; c = ctypes.CDLL(None); exit(c.unshare(0x10020000) or c.mount(b't', b'.', b'tmpfs', 0, 0))"
    return subprocess.run([sys.executable, "-c", script], cwd=folder, check=False).returncode == 0


def test_files_are_limited_in_size_and_number() -> None:
    result = run("with open('a', 'wb') as file:\n    while True: file.write(b'x' * (1 << 20))")
    assert result.reason in ("error", "exited") and ("File too large" in result.detail or "signal 25" in result.detail)
    result = run("import os\nx = []\nwhile True: x.append(open('/dev/null'))")
    assert result.reason == "error" and "Too many open files" in result.detail


def test_recursion_and_crashes_end_the_program_alone() -> None:
    assert run("def f(): f()\nf()").reason == "error"
    deep = run("import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()", seconds=SHORT, memory=128)
    assert deep.reason in ("memory", "exited", "timeout")
    crash = run("import ctypes\nctypes.string_at(0)", "assert True")
    assert crash.reason == "exited" and crash.detail.endswith("signal 11")
    assert run("import os\nos.abort()").detail.endswith("signal 6")


def test_a_folder_without_rights_is_removed(tmp_path: Path) -> None:
    (tmp_path / "a/b/c").mkdir(parents=True)
    (tmp_path / "a/b/c/file").write_text("x")
    for name in ("a/b/c", "a/b", "a"):
        (tmp_path / name).chmod(0)
    remove_folder(tmp_path / "a")
    assert not (tmp_path / "a").exists()


# --- passes that are none ---

PASSING = "assert f() == 1\ndone = True"


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "raise KeyboardInterrupt",
        "def f():\n    import os\n    os._exit(0)",
        "def f():\n    raise SystemExit(0)",
        "import atexit, os\natexit.register(os._exit, 0)\ndef f(): return 2",
        "import threading, os, time\nthreading.Thread(target=lambda: os._exit(0)).start()\ntime.sleep(1)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "print('passed\\n' + '0' * 32)",
        "import os\nfor n in range(64):\n    try: os.write(n, b'passed\\n' + b'0' * 32)\n    except OSError: pass",
        "import os\nfor n in range(64):\n    try: os.write(n, b'passed\\n')\n    except OSError: pass\nos._exit(0)",
        "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None",
        "import os, sys\nos.read = os.write = os._exit = sys.exit = lambda *a: b''",
        "import sys\nsys.modules['__main__']._exec = lambda *a: None",
        "import sys\ndef skip(frame, event, arg):\n    if frame.f_code.co_filename == '<tests>' and event == 'line':\n"
        "        if frame.f_lineno == 1: frame.f_lineno = 2\n    return skip\nsys.settrace(skip)",
        "import builtins\nbuiltins.AssertionError = Exception\ndef f(): return 2",
        "assert False",
        "def f(): assert False",
        "import sys\nsys.stdin.read()\ninput()",
        "__name__ = 'x'\n__builtins__ = {}",
    ],
)
def test_nothing_but_tests_that_ran_to_their_end_passes(source: str) -> None:
    result = run(source, PASSING)
    assert not result.passed and result.reason != "timeout", result


def test_neither_tests_nor_token_are_in_reach_of_the_program() -> None:
    """Not in its arguments, environment, folder, standard input, frames, or any object that Python knows."""
    source = """
import gc, os, sys
seen = [sys.argv, dict(os.environ), os.listdir('.'), sys.stdin.read()]
frame = sys._getframe()
while frame is not None:
    seen.append({**frame.f_globals, **frame.f_locals})
    frame = frame.f_back
seen += [o for o in gc.get_objects() if isinstance(o, (list, tuple, dict, set))]
text = '\\n'.join(map(repr, seen))
assert 'seen += [o for o' in text  # what is there is found
assert ''.join(['fb7c', '90e1']) not in text
def f(): return 1
"""
    assert (result := run(source, PASSING + "  # fb7c90e1")).passed, result


def test_tests_that_are_the_main_program_run() -> None:
    """`if __name__ == "__main__":` around the tests must not make every program pass, nor run the answer's own."""
    tests = "if __name__ == '__main__':\n    assert f() == 1"
    assert run("def f(): return 1\nif __name__ == '__main__':\n    raise SystemExit", tests).passed
    assert run("def f(): return 2", tests).reason == "failed"


def test_tests_and_programs_of_any_size_and_text() -> None:
    """More than a pipe holds, while the program does not read; and text that is no UTF-8."""
    tests = "x = 0\n" + "x += 1  # a long test\n" * 20_000 + "assert f() == 1"
    assert run("import time\ntime.sleep(0.2)\ndef f(): return 1", tests).passed
    assert run("raise ValueError", tests).reason == "error"
    assert run("x = '\udcff'").reason == "error"
    assert run("x = '\0'").reason == "error"
    result = run("raise ValueError('\\udcff' * 10 ** 6)")
    assert result.reason == "error" and len(result.detail) <= 2_000


def test_the_setup_runs_before_the_program() -> None:
    setup = "from typing import List\none = 1\ndef f(x): pass"
    program = Program("def f(x: List[int]): return one", "assert f([]) == 1", setup)
    assert run_program(program, CodeLimitsConfig(timeout_seconds=30.0)).passed


def test_the_program_is_compiled_by_its_own_future_imports() -> None:
    assert run("def f(x: int): pass", "assert f.__annotations__ == {'x': int}").passed
    assert run(
        "from __future__ import annotations\ndef f(x: int): pass", "assert f.__annotations__ == {'x': 'int'}"
    ).passed


# --- many at once ---


def test_results_are_in_order_and_many_run_at_once() -> None:
    sources = [f"def f(): return {i % 2}" for i in range(24)]
    results = code_sandbox.run_programs([Program(s, PASSING) for s in sources], CodeLimitsConfig(timeout_seconds=30.0))
    assert [result.passed for result in results] == [bool(i % 2) for i in range(24)]
    assert code_sandbox.run_programs([], CodeLimitsConfig()) == []


def test_a_parent_that_is_killed_takes_its_programs_along(programs: Path) -> None:
    script = f"""
import tempfile
from rung.scoring.code_sandbox import *
tempfile.tempdir = {str(programs)!r}
run_program(Program('import time; time.sleep(60)', ''), CodeLimitsConfig(timeout_seconds=60.0))
"""
    parent = subprocess.Popen([sys.executable, "-c", script])
    # until the program itself runs, behind its filter: before, the process would find its pipe closed
    wait_for(lambda: any("Seccomp:\t2" in Path(f"/proc/{p}/status").read_text() for p in processes_of(programs)))
    time.sleep(0.1)
    parent.kill()
    parent.wait()
    wait_for(lambda: processes_of(programs) == [])
    for folder in programs.iterdir():  # a killed parent cannot remove it
        shutil.rmtree(folder)


def wait_for(condition: object, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- machines that cannot isolate ---

WITHOUT = """
import ctypes, struct
# for this process and its children a system call is unknown, as on an older kernel or in some containers
filter = [(0x20, 0, 0, 0), {test}, (0x06, 0, 0, 0x50026), (0x06, 0, 0, 0x7FFF0000)]
code = b"".join(struct.pack("=HBBI", *step) for step in filter)
buffer = ctypes.create_string_buffer(code, len(code))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, struct.pack("@HP", len(filter), ctypes.addressof(buffer)), 0, 0) == 0
from rung.errors import RungError
from rung.scoring.code_sandbox import *
try:
    require_isolation("objective.reward.kind")
    print(run_program(Program("{program}", "assert f() == 1"), CodeLimitsConfig(timeout_seconds=30.0)).reason)
except RungError as error:
    print(error)
"""
PROGRAM = "def f(): return 1"
LANDLOCK = WITHOUT.format(test="(0x15, 0, 1, 444)", program=PROGRAM)
# prctl(PR_SET_SECCOMP, ...)
SECCOMP = WITHOUT.format(test="(0x15, 0, 3, 157), (0x20, 0, 0, 16), (0x15, 0, 1, 22)", program=PROGRAM)
FOLDERS = """
import os
assert os.statvfs('.').f_files != 4096
try:
    open('/dev/shm/.rung-canary', 'w')
except OSError:
    pass
else:
    raise SystemExit('shared memory of the system')
os.symlink('/etc', 'link'); os.mkfifo('pipe'); open('file', 'w').close()
os.makedirs('closed/inner'); os.mkdir('closed/none', 0)
for _ in range(300): os.mkdir('d'); os.chdir('d')
os.mkdir('none', 0)
def f(): return 1
"""
NAMESPACES = WITHOUT.format(test="(0x15, 0, 1, 272)", program=FOLDERS.replace("\n", "\\n"))


@X86
@pytest.mark.parametrize(("script", "layer"), [(LANDLOCK, "files (Landlock)"), (SECCOMP, "network (seccomp)")])
def test_without_a_layer_nothing_runs_unless_the_environment_says_so(script: str, layer: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != code_sandbox.ALLOW_VARIABLE}
    said = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert said.stdout.startswith("objective.reward.kind: programs of answers cannot be isolated"), said
    assert layer in said.stdout and "RUNG_ALLOW_UNSANDBOXED_CODE=1" in said.stdout
    environment[code_sandbox.ALLOW_VARIABLE] = "1"
    said = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert said.stdout == "passed\n", said


@X86
def test_without_namespaces_the_folder_is_on_disk_and_removed(programs: Path) -> None:
    """Folders nested deeper than a path may be long, folders without rights, a link to the system's."""
    environment = {**os.environ, "TMPDIR": str(programs)}
    said = subprocess.run(
        [sys.executable, "-c", NAMESPACES], env=environment, capture_output=True, text=True, check=False
    )
    assert said.stdout == "passed\n" and Path("/etc/passwd").exists(), said


def test_another_system_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_sandbox, "_IS_POSIX", False)
    with pytest.raises(PlanError, match="cannot be run on this system"):
        run_program(Program("", ""), CodeLimitsConfig())
    monkeypatch.undo()
    require_isolation("here")


def test_an_interrupt_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while programs run: what waits is not started, what runs is waited for."""
    started = threading.Event()

    def interrupted(program: Program, limits: CodeLimitsConfig) -> ProgramResult:
        if started.is_set():
            raise KeyboardInterrupt
        started.set()
        return run_program(program, limits)

    monkeypatch.setattr(code_sandbox, "run_program", interrupted)
    with pytest.raises(KeyboardInterrupt):
        code_sandbox.run_programs([Program("", "")] * 50, CodeLimitsConfig(timeout_seconds=30.0))

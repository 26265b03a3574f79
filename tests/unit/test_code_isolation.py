"""The filter of system calls, run by an interpreter of BPF that is written here, on machines that are not at hand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from rung.scoring.code_isolation import (
    ARCHITECTURES,
    CHECKED_CALLS,
    DENIED_CALLS,
    NEWEST_CALL,
    Instruction,
    _filter,
    parse_calls,
)

PID = 4711
ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x50001, 0x50026, 0x80000000
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


def verdict(program: Sequence[Instruction], number: int, *arguments: int, architecture: int) -> int:
    """What the kernel's interpreter returns: one accumulator, words of 32 bits, jumps forward alone."""
    words = [number, architecture, 0, 0]
    for argument in (*arguments, *[0] * 6)[:6]:
        words += [argument & 0xFFFFFFFF, argument >> 32]
    accumulator, at = 0, 0
    while True:
        code, yes, no, k = program[at]
        at += 1
        if code == 0x20:
            accumulator = words[k // 4]
        elif code == 0x54:
            accumulator &= k
        elif code == 0x06:
            return k
        else:
            is_true = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[code]
            at += yes if is_true else no


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_numbers_are_those_of_the_kernels_headers(machine: str) -> None:
    if not HEADERS[machine].exists():
        pytest.skip("the headers of the kernel are not installed")
    lines = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", HEADERS[machine].read_text())
    known = {name: int(number) for name, number in lines}
    table = {**parse_calls(DENIED_CALLS, machine), **parse_calls(CHECKED_CALLS, machine)}
    assert table == {name: known[name] for name in table}
    # what the machine has under these names is in the table too
    names = set(DENIED_CALLS.split()[::3]) | set(CHECKED_CALLS.split()[::3])
    assert {name for name in names & known.keys() if known[name] < NEWEST_CALL} == table.keys()


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_every_number_has_the_verdict_of_the_table(machine: str) -> None:
    program, architecture = list(_filter(machine, PID)), ARCHITECTURES[machine]
    denied = set(parse_calls(DENIED_CALLS, machine).values())
    checked = set(parse_calls(CHECKED_CALLS, machine).values())
    for number in range(1000):
        if number not in checked:
            expected = ENOSYS if number >= NEWEST_CALL else EPERM if number in denied else ALLOW
            assert verdict(program, number, architecture=architecture) == expected, number
        assert verdict(program, number, architecture=0x40000003) == KILL  # 32 bits
    assert verdict(program, 0x40000000 + 41, architecture=architecture) == ENOSYS


CALLS = [
    ("clone", (0x3D0F00,), ALLOW),  # what the C library passes for a thread
    ("clone", (17,), EPERM),
    ("clone", (0x10000000 | 17,), EPERM),
    ("clone3", (), ENOSYS),
    ("openat2", (), ENOSYS),
    ("kill", (PID, 9), ALLOW),
    ("kill", (0, 9), ALLOW),
    ("kill", (1, 9), EPERM),
    ("kill", (0xFFFFFFFF, 9), EPERM),
    ("tgkill", (PID, PID, 6), ALLOW),
    ("tgkill", (1, 1, 6), EPERM),
    ("prlimit64", (0, 7, 0, 1 << 40), ALLOW),
    ("prlimit64", (PID, 7, 0, 1 << 40), ALLOW),
    ("prlimit64", (0, 7, 1 << 40, 0), EPERM),  # a pointer whose low half is null
    ("prlimit64", (0, 7, 16, 0), EPERM),
    ("prlimit64", (1, 7, 0, 16), EPERM),
    ("socketpair", (1, 1 | 0x80000, 0), ALLOW),
    ("socketpair", (1, 2, 0), EPERM),
    ("socketpair", (2, 1, 0), EPERM),
    ("sendto", (3, 16, 1, 0, 0, 0), ALLOW),
    ("sendto", (3, 16, 1, 0, 16, 110), EPERM),
    ("sendto", (3, 16, 1, 0, 1 << 40, 110), EPERM),
    ("prctl", (1, 0), EPERM),
    ("prctl", (15, 0), ALLOW),
    ("openat", (0, 16, 0o1000), EPERM),
    ("openat", (0, 16, 0o1001), ALLOW),
    ("openat", (0, 16, 0o2000000), ALLOW),
    ("open", (16, 0o1000), EPERM),
    ("open", (16, 0o1002), ALLOW),
    *(("fcntl", (3, command, 1), EPERM) for command in (8, 10, 15)),
    *(("fcntl", (3, command, 1), ALLOW) for command in (1, 2, 3, 4, 9, 1030)),
    *(("ioctl", (3, request, 1), EPERM) for request in (0x8901, 0x8902)),
    *(("ioctl", (3, request, 1), ALLOW) for request in (0x5401, 0x8903)),
]


@pytest.mark.parametrize("machine", ARCHITECTURES)
@pytest.mark.parametrize(("name", "arguments", "expected"), CALLS)
def test_calls_that_depend_on_their_arguments(
    name: str, arguments: tuple[int, ...], expected: int, machine: str
) -> None:
    numbers = parse_calls(CHECKED_CALLS, machine)
    if name in numbers:
        program = list(_filter(machine, PID))
        assert verdict(program, numbers[name], *arguments, architecture=ARCHITECTURES[machine]) == expected

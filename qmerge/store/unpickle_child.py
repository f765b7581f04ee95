"""What does the child process do that reads a pickle? Run as a file, not imported: `unpickle.py` starts it.

In this order: it leaves the network (a network namespace of its own), imports torch, forbids itself by a seccomp filter to open sockets, to start programs or processes
and to write, rename or remove files, limits its memory, time and output, and only then opens the pickle, with ``weights_only=True``. Tensors go to stdout as safetensors, words to
stderr. Either wall alone keeps it off the network; where the system grants neither it ends before the pickle is opened.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import struct
import sys

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SECONDS = 300
SPARE_BYTES = 2 << 30

# by platform.machine(): the audit number, and system calls to refuse. https://man7.org/linux/man-pages/man2/seccomp.2.html
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
REFUSED_CALLS = {
    "x86_64": {
        "socket": 41, "connect": 42, "sendto": 44, "sendmsg": 46, "bind": 49, "socketpair": 53, "fork": 57, "vfork": 58, "execve": 59, "kill": 62, "truncate": 76, "rename": 82, "mkdir": 83,
        "rmdir": 84, "creat": 85, "link": 86, "unlink": 87, "symlink": 88, "chmod": 90, "chown": 92, "ptrace": 101, "mount": 165, "mkdirat": 258, "unlinkat": 263, "renameat": 264,
        "linkat": 265, "symlinkat": 266, "fchmodat": 268, "process_vm_writev": 311, "renameat2": 316, "execveat": 322, "io_uring_setup": 425, "openat2": 437,
    },
    "aarch64": {
        "mkdirat": 34, "unlinkat": 35, "symlinkat": 36, "linkat": 37, "renameat": 38, "mount": 40, "truncate": 45, "fchmodat": 53, "ptrace": 117, "kill": 129, "socket": 198, "socketpair": 199,
        "bind": 200, "connect": 203, "sendto": 206, "sendmsg": 211, "execve": 221, "process_vm_writev": 271, "renameat2": 276, "execveat": 281, "io_uring_setup": 425, "openat2": 437,
    },
}  # fmt: skip
OPEN = {"x86_64": ((2, 1), (257, 2)), "aarch64": ((56, 2),)}
"""open and openat, each with the argument that holds its flags"""
CLONE, CLONE3 = {"x86_64": 56, "aarch64": 220}, 435
O_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
THREAD = 0x00010000


def leave_network() -> bool:
    """A network namespace without any interface; an own user namespace where that needs one."""
    libc = ctypes.CDLL(None, use_errno=True)
    return any(libc.unshare(flags) == 0 for flags in (CLONE_NEWNET, CLONE_NEWUSER | CLONE_NEWNET))


def program(machine: str) -> list[tuple[int, int, int, int]]:
    """The filter as BPF instructions (code, jump if true, jump if false, value)."""
    load, equal, any_bit, give = 0x20, 0x15, 0x45, 0x06
    allow, deny, missing, kill = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38, 0x80000000  # EPERM; ENOSYS lets libc take clone instead of clone3
    rules = [(load, 0, 0, 4), (equal, 1, 0, AUDIT[machine]), (give, 0, 0, kill), (load, 0, 0, 0)]
    if machine == "x86_64":
        rules += [(0x35, 0, 1, 0x40000000), (give, 0, 0, kill)]  # the x32 numbers of the same calls
    for number in sorted(REFUSED_CALLS[machine].values()):
        rules += [(equal, 0, 1, number), (give, 0, 0, deny)]
    rules += [(equal, 0, 1, CLONE3), (give, 0, 0, missing)]
    for number, argument in OPEN[machine]:
        rules += [(equal, 0, 4, number), (load, 0, 0, 16 + 8 * argument), (any_bit, 0, 1, O_WRITING), (give, 0, 0, deny), (give, 0, 0, allow)]
    rules += [(equal, 0, 4, CLONE[machine]), (load, 0, 0, 16), (any_bit, 1, 0, THREAD), (give, 0, 0, deny), (give, 0, 0, allow)]
    return [*rules, (give, 0, 0, allow)]


def forbid_calls() -> bool:
    """A seccomp filter for all threads of this process; False where this system has none."""
    machine, libc = platform.machine(), ctypes.CDLL(None, use_errno=True)
    if machine not in AUDIT or libc.prctl(38, 1, 0, 0, 0) != 0:  # PR_SET_NO_NEW_PRIVS
        return False
    rules = b"".join(struct.pack("HBBI", *rule) for rule in program(machine))
    held = ctypes.create_string_buffer(rules, len(rules))
    head = struct.pack("HxxxxxxP", len(rules) // 8, ctypes.addressof(held))
    seccomp = {"x86_64": 317, "aarch64": 277}[machine]
    return bool(libc.syscall(seccomp, 1, 1, ctypes.create_string_buffer(head, len(head))) == 0)  # SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC


def limit(pickle_bytes: int) -> None:
    """Memory, processor time and output in proportion to the pickle; no core file, which would hold its contents."""
    import resource

    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    for kind, most in ((resource.RLIMIT_AS, mapped + 6 * pickle_bytes + SPARE_BYTES), (resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_FSIZE, 4 * pickle_bytes + (1 << 20)), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def words(problem: Exception) -> str:
    """What was wrong, in one line. torch's own first line is advice to read the pickle without weights_only."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()] or [""]
    told = next((line for line in lines if "GLOBAL" in line or "Unsupported" in line or "error:" in line), lines[0])
    return "it holds more than tensors and plain containers" if "weights_only" in told and "Re-running" in told else told.partition("WeightsUnpickler error: ")[2] or told


def main() -> None:
    job = json.loads(sys.stdin.buffer.read())
    sys.path[:] = job["path"]
    alone = leave_network() if sys.platform == "linux" else False
    import safetensors.torch
    import torch

    torch.set_num_threads(1)
    file = open(job["pickle"], "rb")  # noqa: SIM115  open before the filter: what is denied later must not depend on how this is opened
    filtered = forbid_calls() if sys.platform == "linux" else False
    if not (alone or filtered):
        sys.exit("this system lets no process be cut off the network, so the pickle was not opened")
    limit(os.fstat(file.fileno()).st_size)
    state = torch.load(file, map_location="cpu", weights_only=True)
    if type(state) is not dict and not isinstance(state, dict):
        sys.exit(f"it holds a {type(state).__name__}, not named tensors")
    if not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()):
        sys.exit("it holds something other than named tensors")
    if odd := next((key for key, value in state.items() if value.layout is not torch.strided or value.device.type != "cpu"), None):
        sys.exit(f"{odd!r} is no plain tensor")
    raw = safetensors.torch.save({key: value.detach().contiguous().clone() for key, value in state.items()})
    sys.stdout.buffer.write(raw)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    try:
        main()
    except Exception as problem:  # one line for the parent, which shows it; a traceback would name folders of this machine
        with contextlib.suppress(Exception):
            sys.stderr.write(f"{type(problem).__name__}: {words(problem)}\n")
        os._exit(1)

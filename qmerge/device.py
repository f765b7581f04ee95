"""Which device computes? The only file that speaks to an accelerator."""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch

from qmerge.device_names import KNOWN
from qmerge.errors import UsageProblem
from qmerge.room import Room, peak_rss_bytes

Item = TypeVar("Item")
Result = TypeVar("Result")


def pick_device(wish: str) -> torch.device:
    """``cpu``, ``cuda``, ``cuda:N`` or ``auto`` (CUDA where there is one). Asking for a CUDA device that is not there is an error, never a fall-back."""
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wish.startswith("cuda") and not torch.cuda.is_available():
        raise UsageProblem("no CUDA device is available", where=f"--device {wish}", fix="use --device cpu or --device auto")
    try:
        return torch.device(wish)
    except RuntimeError as problem:
        raise UsageProblem("unknown device", where=f"--device {wish}", expected=KNOWN, fix="--device auto takes the GPU where there is one") from problem


def own_device(wish: str, local_rank: int, local_size: int) -> str:
    """One accelerator for each of several processes on a host: ``cuda:0`` for the first, and so on; ``cpu`` where there is none or it is asked for. Raises UsageProblem where they do not suffice."""
    if local_size == 1 or wish == "cpu" or (wish == "auto" and not torch.cuda.is_available()):
        return wish
    if wish not in ("auto", "cuda"):
        raise UsageProblem("several processes of a host would share one device", where=f"--device {wish}", expected="auto, cuda or cpu", fix="leave --device out: each process takes one of its own")
    if wish == "auto" or torch.cuda.is_available():
        if torch.cuda.device_count() < local_size:
            raise UsageProblem("there are more processes than devices on a host", where=f"--device {wish}", expected=f"{local_size} devices", found=torch.cuda.device_count(), fix="start fewer processes per host")
        return f"cuda:{local_rank}"
    return wish


def group_backend(device: str, local_rank: int) -> str:
    """What carries tensors between processes. Where that is NCCL, this process's own device becomes the current one, as NCCL wants it. Not yet run on a GPU."""
    if device == "cpu" or not torch.cuda.is_available() or local_rank >= torch.cuda.device_count():
        return "gloo"
    torch.cuda.set_device(local_rank)
    return "cpu:gloo,cuda:nccl"


@contextmanager
def exact_products() -> Iterator[None]:
    """Within it, fp32 products are taken in fp32 and by the quicker of torch's two libraries; settings of the whole process, put back afterwards.

    On CUDA TF32 would put 1e-3 errors into a merge, and parts of a bf16 product that different multiprocessors have summed would be added up in bf16. On AMD's processors MKL leaves half of the vector width unused, and oneDNN is some two times quicker (docs/measurements/products.md). torch hands products to oneDNN
    only where it may take them in bf16; whether it does is tried out on one that bf16 would spoil, and where it does MKL stays. torch's older name for the setting
    (``get_float32_matmul_precision``) cannot be asked meanwhile, and two threads of a process may not be in it at once.
    """
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    tf32, in_bf16, before = cuda.allow_tf32, cuda.allow_bf16_reduced_precision_reduction, cpu.fp32_precision
    cuda.allow_tf32 = cuda.allow_bf16_reduced_precision_reduction = False
    try:
        if leaves_vectors_unused(_cpuinfo()):
            cpu.fp32_precision = "bf16"
            if not _products_are_fp32():
                cpu.fp32_precision = before
        yield
    finally:
        cuda.allow_tf32, cuda.allow_bf16_reduced_precision_reduction, cpu.fp32_precision = tf32, in_bf16, before


def leaves_vectors_unused(cpuinfo: str) -> bool:
    """MKL, by what Linux says of the processor."""
    return "AuthenticAMD" in cpuinfo and re.search(r"^flags\s*:.*\bavx512bw\b", cpuinfo, re.MULTILINE) is not None


def _products_are_fp32() -> bool:
    """bf16 holds 8 bits of a number, TF32 11; these have 24."""
    factor = 1 + torch.arange(1.0, 65.0).repeat(64, 1) * 2.0**-23
    return torch.equal(factor @ torch.eye(64), factor)


@dataclass(frozen=True)
class Compute:
    """In what matrix products on calibration text are taken. ``passes``: the two streams through the blocks; ``sums``: statistics and gradients. All are summed in fp32."""

    passes: torch.dtype
    sums: torch.dtype


COMPUTE = {"fp32": Compute(torch.float32, torch.float32), "mixed": Compute(torch.float32, torch.bfloat16), "bf16": Compute(torch.bfloat16, torch.bfloat16)}
"""what says so in a recipe. ``mixed`` costs nothing that shows; ``bf16`` next to nothing in whole numbers of up to 4 bits (KL 1.01 to 1.03 of mixed on light and strong, docs/measurements/quick.md), and 2 to 17 % of the KL of an NF4 file,
which is smaller: where two streams pass, their difference, rounded apart, is what the solver answers (docs/measurements/passes-bf16.md; quick.md for one stream)"""


def pick_compute(wish: str, device: torch.device, coarse: bool = False) -> str:
    """A key of `COMPUTE`; ``auto`` is, on an accelerator and on CPUs that are quick at bf16, ``bf16`` where the output is ``coarse`` enough that its rounding does not show beside that of the output, else ``mixed``; on other
    CPUs ``fp32``. The same machine always gives the same answer: two runs must give the same bytes."""
    if wish != "auto":
        return wish
    if device.type == "cpu" and not quick_at_bf16(_cpuinfo()):
        return "fp32"
    return "bf16" if coarse else "mixed"


def quick_at_bf16(cpuinfo: str) -> bool:
    """By what Linux says of the processor: AMX tiles, or AMD's AVX512-BF16 (docs/measurements/compute.md has both rates; Intel's without AMX was slower than fp32)."""
    flags = set(found[1].split()) if (found := re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)) else set()
    return "amx_bf16" in flags or ("avx512_bf16" in flags and "AuthenticAMD" in cpuinfo)


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def products_in(compute: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Within it, matrix products and attention of this thread take their factors in ``compute``; sums within a product, norms and what is added up stay in fp32."""
    return nullcontext() if compute == torch.float32 else torch.autocast(device.type, compute)


def wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
    """``left @ right`` of bf16 matrices, in fp32 as a GPU's matrix units sum it; None elsewhere, where torch has no such product. Not yet run on a GPU."""
    return torch.mm(left, right, out_dtype=torch.float32) if left.device.type == "cuda" else None


def runs_triton(device: torch.device) -> bool:
    """Whether kernels that are written in Triton run there: a GPU, Triton (it comes with torch for Linux), and a C compiler with Python's headers, of which it makes what launches them."""
    return device.type == "cuda" and _triton_starts()


@cache
def _triton_starts() -> bool:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return find_spec("triton") is not None and compiler is not None and Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").is_file()


def without_triton(device: torch.device) -> str:
    """What a user of a GPU must know where Triton does not start there; nothing elsewhere."""
    if device.type != "cuda" or runs_triton(device):
        return ""
    return "Triton does not start here: columns are rounded, and adapters merged, by torch's own operations, which takes longer and may change last bits; it wants a C compiler (gcc) and Python's headers (python3-dev)"


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Within it, Triton launches on ``device``: it asks which one is the thread's current one (in a new thread the first), not where its tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def peak_device_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def device_name(device: torch.device) -> str:
    """What the device is called: ``cpu``, or the accelerator's own name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in main memory, laid out as it was: itself where it is there; from a CUDA device into pages that the device can read by itself, so that it comes back without anybody waiting."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on ``device``: itself where it is there. What is computed with it next waits for it; this process does not."""
    return tensor.to(device, non_blocking=True)


def side_stream(device: torch.device) -> AbstractContextManager[object]:
    """Within it, this thread's work on a CUDA device neither waits for that of others nor holds it up. Results must be in main memory before it ends: nothing else waits for them."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def limit_device(device: torch.device, nbytes: int) -> None:
    """From here on torch fails rather than take more of a CUDA device; on others nothing happens. What CUDA itself takes (some 0.5 GB) comes on top."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / torch.cuda.get_device_properties(device).total_memory), device)


def wait_for(device: torch.device) -> None:
    """Return when all work queued on the device is done, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """The peak since the last `reset`, in bytes: what torch allocated on an accelerator, on a CPU the resident memory of the whole process.

    ``how`` says which. Where the system cannot forget a process's peak (not Linux, or not allowed), it is the peak since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        on_cpu = "resident memory of the process" if self.reset() else "resident memory of the process since it began (this system cannot reset the peak)"
        self.how = "memory that torch allocated on the device" if device.type == "cuda" else on_cpu

    def reset(self) -> bool:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def peak(self) -> int:
        if self.device.type == "cuda":
            return peak_device_bytes(self.device)
        try:  # getrusage keeps the highest of all times, and on Linux even what the parent had reached before this process began
            found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        except OSError:
            found = None
        return int(found[1]) * 1024 if found else peak_rss_bytes()


def worker_threads(device: torch.device) -> int:
    """How many threads a stream of small independent jobs should use: one per core on a CPU, two on a GPU (one copies while one computes)."""
    return torch.get_num_threads() if device.type == "cpu" else 2


def in_parallel(work: Callable[[Item], Result], items: Sequence[Item], device: torch.device) -> list[Result]:
    """``[work(item) for item in items]``, on a CPU with one thread per item at a time and as many items as there are threads.

    Long chains of small operations run faster so than with all threads inside each operation, and their bits do not depend on the thread count.
    """
    if device.type != "cpu":
        return [work(item) for item in items]
    threads = torch.get_num_threads()

    def alone(item: Item) -> Result:
        torch.set_num_threads(1)
        with torch.no_grad():  # grad mode belongs to a thread
            return work(item)

    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(alone, items))
    finally:
        torch.set_num_threads(threads)


def device_room(device: torch.device) -> Room | None:
    """What is free on an accelerator; None on a CPU."""
    return Room(torch.cuda.mem_get_info(device)[0], f"free on {device}") if device.type == "cuda" else None

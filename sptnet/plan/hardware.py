"""What GPUs really do, by whom it was measured; what nobody has measured is not in the table."""

import time
from dataclasses import dataclass

import torch

from sptnet.errors import SptnetError
from sptnet.run.throughput import matmul_peak
from sptnet.strategy.base import DTYPES

SPARE = 0.08  # of a GPU's memory for CUDA's context, NCCL and what is between blocks: assumed, not measured
LAUNCH = 5e-6  # seconds of the host per operation: pytorch/pytorch#41383, without a gradient
BETWEEN_NODES = 25e9  # bytes/s of a GPU to other nodes, of a network card of 200 Gbit/s: assumed, not measured
LATENCY = 2e-5  # seconds of a collective of no bytes inside of a node, and ...
LATENCY_BETWEEN = 4e-5  # ... between nodes: assumed, not measured
# images of two views that one core loads in a second: docs/costs.md, a core of an AMD EPYC, --resize 256
LOADED = 1592.0
# bytes of kept tokens that one core reads and checks in a second: 77 MB from memory took 36 to 48 ms of such a core
READ = 1.8e9
MAMF = "ml-engineering (S. Bekman), Maximum Achievable Matmul FLOPS, bf16"


class PlanError(SptnetError, ValueError):
    """A run that cannot be planned: what is not known of it, or of the machine."""

    exit_code = 2


@dataclass(frozen=True)
class Machine:
    """A GPU, or the CPU that `--calibrate` runs on.

    Attributes:
        memory: bytes.
        matmul: operations per second of the fastest product, by dtype; float32 of a GPU as its data sheet says.
        bandwidth: bytes/s of its memory.
        reduce, gather: bytes/s of an all-reduce and of other collectives among the GPUs of a node, as bus bandwidth.
        watts: at most.
        sources: of matmul, bandwidth, and collectives.
    """

    name: str
    memory: int
    matmul: dict[torch.dtype, float]
    bandwidth: float
    reduce: float | None
    gather: float | None
    watts: float | None
    sources: tuple[str, ...]
    launch: float = LAUNCH

    def check(self, precision: str) -> None:
        """Raise PlanError where nobody has measured the rate that decides in a precision."""
        if precision == "no" and self.watts is not None:
            raise PlanError(
                f"no measured matmul rate of float32 is known for {self.name}, only of bfloat16 and float16: use "
                "--precision bf16 or fp16, or --calibrate on such a machine"
            )


def _gpu(
    name: str, gib: float, tflops: float, float32: float, tb_s: float, reduce: float | None, gather: float | None,
    watts: float, matmul: str, collectives: str,
) -> Machine:  # fmt: skip
    # fp16 runs on the same units at the same speed
    rates = {torch.bfloat16: tflops * 1e12, torch.float16: tflops * 1e12, torch.float32: float32 * 1e12}
    sources = (
        f"{MAMF}: {matmul}",
        "float32 (the losses), memory bandwidth and power: data sheet, not measured",
        collectives,
    )
    return Machine(name, int(gib * 2**30), rates, tb_s * 1e12, reduce, gather, watts, sources)


GPUS = {
    "h100": _gpu("h100", 79, 794.5, 67, 3.35, 480e9, 370e9, 700, "H100 SXM, torch 2.7.0+cu126",
                 "8 GPUs by NVLink: NVIDIA/nccl-tests#212"),
    "h200": _gpu("h200", 140, 794.5, 67, 4.8, 475e9, 370e9, 700, "H100 SXM, 'H200 is the same'",
                 "8 GPUs by NVLink: NVIDIA/nccl-tests#272; gathers as of an H100, #212"),
    "a100": _gpu("a100", 79, 271.2, 19.5, 2.0, 208e9, 208e9, 400, "A100 SXM, torch 2.6.0+cu126",
                 "2 GPUs by NVLink: NVIDIA/nccl-tests#178"),
    "a100-pcie": _gpu("a100-pcie", 79, 252.9, 19.5, 1.9, None, None, 300, "A100 PCIe, torch 2.5.1+cu124",
                      "no measured collectives: none are planned"),
}  # fmt: skip


def gpu(name: str) -> Machine:
    """A GPU by name; raises PlanError, with the names of those that are known."""
    if name not in GPUS:
        raise PlanError(f"--gpu {name}: nothing measured of it is known here; known are {', '.join(GPUS)}")
    return GPUS[name]


def this_machine(device: torch.device, precision: str) -> Machine:
    """The machine that this process computes on, measured now: a second or two."""
    dtypes = {torch.float32, DTYPES.get(precision, torch.float32)}
    rates = {dtype: matmul_peak(device, dtype) for dtype in dtypes}
    size = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} cores"
    return Machine(
        name, size, rates, _bandwidth(device), None, None, None, ("measured now",), _launch(device)
    )  # fmt: skip


def _bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a sum of two tensors."""
    a, b = (torch.ones(2**24, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return 3 * a.nbytes / _fastest(lambda: torch.add(a, b, out=out), device, 1)


def _launch(device: torch.device) -> float:
    tiny = torch.ones(1, device=device)

    def many() -> None:
        for _ in range(1000):
            torch.add(tiny, tiny)

    return _fastest(many, device, 1000)


def _fastest(does: object, device: torch.device, count: int) -> float:
    fastest = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        does()  # type: ignore[operator]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - begin)
    return fastest / count

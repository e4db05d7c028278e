"""Which kernels of a GPU compute: how exact float32 matrix products are, and whether sums have a fixed order."""

import os
from typing import Any, Literal

import torch
import torch.utils.deterministic

MatmulPrecision = Literal["highest", "high", "medium"]


def kernels_told(device: torch.device, matmul_precision: MatmulPrecision, deterministic: bool) -> dict[str, Any]:
    """What of these decides the numbers of a device, for a fingerprint: nothing on the CPU."""
    return {"matmul_precision": matmul_precision, "deterministic": deterministic} if device.type == "cuda" else {}


def choose_kernels(device: torch.device, matmul_precision: MatmulPrecision, deterministic: bool) -> None:
    """Set what torch computes with on a GPU, for this process; on the CPU nothing changes, where sums are in order.

    Args:
        matmul_precision: of float32: highest (as they are), high (TF32: 10 bits of mantissa), medium (bfloat16).
        deterministic: the same bits for the same batch on the same card. Flash and memory-efficient attention add up
            their gradients in no fixed order; the explicit products take their place.
    """
    if device.type != "cuda":
        return
    torch.set_float32_matmul_precision(matmul_precision)
    torch.backends.cudnn.allow_tf32 = matmul_precision != "highest"  # on by default, whatever matrix products do
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is computed
        torch.use_deterministic_algorithms(True)
        # nothing here reads what it has not written
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)

"""The switches that `matmul_precision` and `deterministic` turn; torch has them without a GPU, no kernel runs here."""

import torch
import torch.utils.deterministic

from sptnet.config import Config
from sptnet.strategy.kernels import choose_kernels


def switches():
    cuda = torch.backends.cuda
    return {
        "precision": torch.get_float32_matmul_precision(), "convolutions": torch.backends.cudnn.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "attention": [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()],
        "filled": torch.utils.deterministic.fill_uninitialized_memory, "benchmark": torch.backends.cudnn.benchmark,
    }  # fmt: skip


def put_back(before):
    torch.set_float32_matmul_precision(before["precision"])
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before["convolutions"], before["benchmark"]
    torch.use_deterministic_algorithms(before["deterministic"])
    torch.utils.deterministic.fill_uninitialized_memory = before["filled"]
    for set_to, enabled in zip(
        (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.enable_mem_efficient_sdp,
         torch.backends.cuda.enable_cudnn_sdp), before["attention"], strict=True,
    ):  # fmt: skip
        set_to(enabled)


def test_nothing_changes_on_the_cpu():
    before = switches()
    choose_kernels(torch.device("cpu"), "high", deterministic=True)
    assert switches() == before
    assert before["precision"] == "highest"


def test_on_a_gpu_they_are_what_is_configured(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = switches()
    try:
        choose_kernels(torch.device("cuda"), "high", deterministic=False)
        fast = switches()
        assert fast == before | {"precision": "high", "convolutions": True}
        choose_kernels(torch.device("cuda"), "highest", deterministic=True)
        exact = switches()
        assert (exact["precision"], exact["convolutions"], exact["deterministic"]) == ("highest", False, True)
        assert exact["attention"] == [False] * 3
        assert not exact["filled"]
    finally:
        put_back(before)


def test_gpus_are_fast_by_default_and_not_held_to_an_order():
    fields = Config.model_fields
    assert (fields["matmul_precision"].default, fields["deterministic"].default) == ("high", False)

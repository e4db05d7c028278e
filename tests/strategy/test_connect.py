"""What a launcher's environment asks for, and what it cannot mean."""

import multiprocessing
import os
import re
import socket
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed import FileStore

from sptnet import create_model
from sptnet.strategy import connect
from sptnet.strategy.connect import gpus_said, limit_waiting
from sptnet.strategy.create import create_strategy
from sptnet.strategy.launcher import LaunchSettings, StrategyError, launch_settings

LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
NAMES = ("WORLD_SIZE", *LAUNCHED, "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP",
         "FSDP_VERSION", "ACCELERATE_DEEPSPEED_ZERO_STAGE", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
         "PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "PARALLELISM_CONFIG_DP_SHARD_SIZE", "PARALLELISM_CONFIG_TP_SIZE",
         "CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS")  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return lambda values: [monkeypatch.setenv(name, value) for name, value in values.items()]


@pytest.mark.parametrize(
    ("values", "strategy"),
    [({}, "single"), ({"WORLD_SIZE": "1", **LAUNCHED}, "ddp"), ({"WORLD_SIZE": "2", **LAUNCHED}, "ddp"),
     ({"WORLD_SIZE": "2", **LAUNCHED, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "fsdp2")],
)  # fmt: skip
def test_settings(environment, values, strategy):
    environment(values)
    assert launch_settings().strategy == strategy


@pytest.mark.parametrize(
    ("values", "words"),
    [({"WORLD_SIZE": "2"}, "a launcher's other variables"), ({"WORLD_SIZE": "two", **LAUNCHED}, "WORLD_SIZE is 'two'"),
     ({"WORLD_SIZE": "-1", **LAUNCHED}, "no number of processes"), ({"WORLD_SIZE": "²", **LAUNCHED}, "no number"),
     ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "x"}, "starts one"),
     ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision is fp8"),
     ({"WORLD_SIZE": "2", **LAUNCHED, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
       "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "x"}, "is 'x'"),
     ({**LAUNCHED, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
      "fsdp_activation_checkpointing of the accelerate configuration is true, which nothing here reads: set memory."),
     ({**LAUNCHED, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"},
      "fsdp_reshard_after_forward"),
     ({**LAUNCHED, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "gradient_clipping"),
     ({**LAUNCHED, "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend"),
     ({**LAUNCHED, "ACCELERATE_USE_FSDP": "true"}, "FSDP version 1 is not run here"),
     ({**LAUNCHED, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "stage 0 is not run"),
     ({**LAUNCHED, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
       "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "DeepSpeed offloading is not run here"),
     ({"WORLD_SIZE": "6", **LAUNCHED, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
       "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"},
      "2 copies of 2 shards are not 6 processes"),
     ({"WORLD_SIZE": "4", **LAUNCHED, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
       "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "1", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"},
      "shards over 2 of 4 processes: leave parallelism_config out"),
     ({"WORLD_SIZE": "4", **LAUNCHED, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
       "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2", "PARALLELISM_CONFIG_TP_SIZE": "2"},
      "parallelism_config_tp_size of the accelerate configuration is 2, which nothing here reads")],
)  # fmt: skip
def test_mistakes(environment, values, words):
    environment(values)
    with pytest.raises(StrategyError, match=words):
        launch_settings()


@pytest.mark.parametrize(
    ("left", "words"),
    [
        ({"LOCAL_RANK": "0"}, "RANK is '', beside LOCAL_RANK and 1 processes: .* or unset"),
        ({**LAUNCHED, "WORLD_SIZE": "2", "RANK": "x"}, "RANK is 'x'"),
        ({**LAUNCHED, "WORLD_SIZE": "2", "RANK": "2"}, "RANK is '2'"),
        ({**LAUNCHED, "WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
        ({**LAUNCHED, "WORLD_SIZE": "2", "MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
    ],
)
def test_what_another_launcher_left_is_named(environment, left, words):
    environment(left)
    with pytest.raises(StrategyError, match=words):
        launch_settings()


def test_groups_that_are_made_later_wait_as_long_as_the_first(tmp_path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1, timeout=timedelta(seconds=77)
    )
    try:
        group = dist.new_group([0])
        assert limit_of(group) != timedelta(seconds=77)
        limit_waiting([group])
        assert limit_of(group) == timedelta(seconds=77)
    finally:
        dist.destroy_process_group()


def limit_of(group):
    return group._get_backend(torch.device("cpu")).options._timeout


@pytest.mark.parametrize(
    ("asked", "got", "words"),
    [
        (("ddp", 2), (1, "MULTI_CPU"), "2 processes were asked for, accelerate connected 1"),
        (("zero2", 2), (2, "MULTI_CPU"), "zero2 was asked for, accelerate gives MULTI_CPU: is deepspeed installed"),
        (("ddp", 2), (2, "DEEPSPEED"), "ddp was asked for, accelerate gives DEEPSPEED"),
    ],
)
def test_what_accelerate_falls_back_to_is_no_answer(asked, got, words):
    accelerator = SimpleNamespace(num_processes=got[0], distributed_type=DistributedType(got[1]))
    with pytest.raises(StrategyError, match=words):
        connect._check(LaunchSettings(*asked, "no", asked[1]), accelerator)


def test_a_wrapper_that_was_not_asked_for_is_refused():
    accelerator, launch = connect.connect(60, "cpu")
    model = torch.nn.Linear(2, 2)
    with pytest.raises(StrategyError, match="single was asked for, which makes a PromptedViT, not a Linear"):
        create_strategy(accelerator, launch, model, lambda m: torch.optim.SGD(m.parameters(), lr=0.1, fused=True), 1)


@pytest.mark.parametrize(
    ("values", "said"),
    [({}, None), ({"SLURM_GPUS_ON_NODE": "0"}, None), ({"SLURM_GPUS_ON_NODE": "2"}, "SLURM_GPUS_ON_NODE=2"),
     ({"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES=0,1"), ({"CUDA_VISIBLE_DEVICES": ""}, None),
     ({"CUDA_VISIBLE_DEVICES": "-1", "SLURM_GPUS_ON_NODE": "2"}, None), ({"SLURM_JOB_GPUS": "3"}, "SLURM_JOB_GPUS=3")],
)  # fmt: skip
def test_who_says_that_there_is_a_gpu(environment, monkeypatch, values, said):
    monkeypatch.setattr(connect, "DEVICES", connect.Path("/nowhere"))
    environment(values)
    assert gpus_said() == said


def test_a_gpu_that_cannot_be_used_is_an_error_unless_the_cpu_was_asked_for(environment, monkeypatch):
    environment({"SLURM_GPUS_ON_NODE": "2"})
    monkeypatch.setattr(connect.torch.cuda, "is_available", lambda: False)
    with pytest.raises(StrategyError, match=r"there should be a GPU on .*SLURM_GPUS_ON_NODE=2"):
        connect.connect(60)
    connect.connect(60, "cpu")


def looked(path, rank, size, card):
    """What a rank with a card hears of the others, twice: a process may connect again."""
    os.environ.update({"WORLD_SIZE": str(size), "RANK": str(rank)})
    store = FileStore(str(path), size)  # gone when all ranks have let go of it
    connect.launcher_store = lambda purpose, timeout_s: store
    connect.torch.cuda.is_available = lambda: True
    connect._gpu_here = lambda: card
    try:
        return connect._agree_on_device(False, 60) and connect._agree_on_device(False, 60)
    except StrategyError as error:
        return str(error)


@pytest.mark.parametrize(("cards", "shared"), [(["a 1", "a 1", "b 1"], True), (["a 1", "a 2", "b 1"], False)])
def test_two_processes_on_one_gpu_are_refused_on_every_rank(tmp_path, cards, shared):
    size = len(cards)
    with multiprocessing.get_context("fork").Pool(size) as ranks:
        told = ranks.starmap(looked, [(tmp_path / "store", n, size, card) for n, card in enumerate(cards)], 1)
    for one in told:
        assert ("have the same GPU: start as many as it has" in one) if shared else one is True


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("8", r"finds 7 there, and the job was given 8 .*\(sbatch --exclude="),
        ("7", "start as many"),
        ("", "start as many"),
    ],
)
def test_a_gpu_that_is_gone_is_told_from_too_many_processes(monkeypatch, given, told):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(connect.torch.cuda, "device_count", lambda: 7)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", given)
    assert re.search(told, connect._too_few_here())
    if given == "8":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6")  # as many as somebody chose
        assert "start as many" in connect._too_few_here()


def wrapped_on_one_gpu(told, port):
    """What becomes of the model where accelerate believes that this, a launcher's only process, is on a GPU."""
    os.environ.update({**LAUNCHED, "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": str(port)})
    accelerator, launch = connect.connect(60, "cpu")
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    model = create_model("vit_tiny_patch16_224", 2, 2, image_size=32, weights="none")
    strategy = create_strategy(accelerator, launch, model, lambda m: torch.optim.SGD(m.parameters(), fused=True), 1)
    told.put((launch.strategy, accelerator.multi_device, strategy.wrapper, strategy._wrapped.device_ids))
    dist.destroy_process_group()


def test_the_only_process_of_a_launcher_is_wrapped_on_a_gpu_too():
    """Accelerate wraps it on a CPU only, and `--num_processes 1` ended on one GPU before its first step."""
    spawned = multiprocessing.get_context("spawn")
    told = spawned.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = spawned.Process(target=wrapped_on_one_gpu, args=(told, port))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    # and its inputs are not sent to the card of its LOCAL_RANK, where it sees another one
    assert told.get() == ("ddp", False, "DistributedDataParallel", None)

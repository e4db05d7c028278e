"""How a run is spread over processes: one process, DDP, FSDP2 or DeepSpeed ZeRO, behind one interface.

    launcher      what accelerate launch left in the environment, and its store
    connect       joins the processes, and checks that one got what was asked for
    create        the strategy that was asked for
    base          what the training loop needs of one; `plain` (single, DDP), `fsdp` and `zero` are the three kinds
    collectives   the gathers of objective and evaluation
    recompute     gradient checkpointing; `compiled`: blocks by torch.compile; `attention`: by explicit products
    kernels       what a GPU computes with; `frozen`: where frozen blocks lie; `freed`: memory that is kept on the CPU
    readback      what the host reads of the device, a step later

May import `config`, `method` and `errors`. The prompts stay outside: they are the same on every
rank. Begin with `base.py`.
"""

"""What a run will cost, before it runs: memory, time, bytes sent and stored.

    live            bytes of tensors that are alive, of real and of fake ones
    work            operations and collectives of a step
    trial           steps of both phases, counted
    fake_ranks      the real strategy on pretended ranks, with tensors that have no numbers
    zero            what DeepSpeed adds, by a formula
    hardware        what GPUs do, with sources
    seconds         from operations to time
    dataset         how many images there are
    largest         the largest batch
    memory_settings what lets a run in that does not fit
    planned         what a plan is, and its one recommendation
    planning        all of it; `printing` prints it, `calibrate` takes real steps beside it
    measured_run    what a run was, and measured; `comparison` sets its plan beside it

Begin with `trial.py`.
"""

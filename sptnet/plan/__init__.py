"""What a run will cost, before it runs: memory, time, bytes sent and stored.

    live       bytes of tensors that are alive, of real and of fake ones
    work       operations and collectives of a step
    trial      steps of both phases, counted
    pretend    the real strategy on pretended ranks, with tensors that have no numbers
    zero       what DeepSpeed adds, by a formula
    hardware   what GPUs do, with sources
    seconds    from operations to time
    dataset    how many images there are
    largest    the largest batch
    way_out    what lets a run in that does not fit
    planned    what a plan is, and its one recommendation
    planning   all of it; `telling` prints it, `calibrate` takes real steps beside it
    ran        what a run was, and measured; `beside` sets its plan beside it

Begin with `trial.py`.
"""

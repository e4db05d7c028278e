"""What a run writes, survives and tells.

    folder        what is in a run's folder, and how it is read and written
    model_file    weights as they are evaluated                 records     JSON files, typed where they are read
    checkpoint    the format of checkpoints                     saving      writing them in the background
    resume        where a run continues, and whether its numbers are the same
    lock          one process at a time in a run's folder       signals     being asked to stop
    tolerance     steps not finite, damaged samples: left out, counted, limited
    outcome       how a process failed, for whoever started it, and what torch's exceptions mean
    metrics_log   log.txt, metrics.jsonl, the bar               progress    how far something long is
    trackers      the same to TensorBoard and others            throughput  images/s, memory, share of the matmul peak
    provenance    header, starts.jsonl                          tables      results of several runs
    parts         files of what is computed part by part: whole or absent, continued
    predictions   what an evaluation predicted              step_readback  what the host learns of a step, one later

May import `steps` and what is below it. Begin with `folder.py`, whose docstring lists a run's files.
"""

"""What a run writes, survives and tells.

    folder        what is in a run's folder, and how it is read and written
    checkpoint    the format of checkpoints           saving      writing them in the background
    resume        where a run continues, and whether its numbers are the same
    signals       being asked to stop                 tolerance   steps not finite, damaged samples: left out, counted
    outcome       how a process failed, for whoever started it
    metrics_log   progress bar, log.txt, metrics.jsonl          trackers    the same to TensorBoard and others
    throughput    images/s, memory, share of the matmul peak    provenance  header, starts.jsonl
    tables        results of several runs

May import `steps` and what is below it. Begin with `folder.py`, whose docstring lists a run's files.
"""

"""What a process on the CPU does with freed memory, counted in pages that the system had to fill."""

import subprocess
import sys

import pytest
from launching import ENVIRONMENT

ROUNDS = """
import resource, sys, torch
from sptnet.strategy.connect import connect
connect(60, "cpu")
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):
    before = faults()
    torch.ones(24 << 20)  # 96 MiB, 24,576 pages
    print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="malloc of glibc")
@pytest.mark.parametrize(("of_user", "kept"), [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "33554432"}, False)])
def test_a_step_does_not_ask_for_the_memory_of_the_last_one_again(of_user, kept):
    plain = {key: value for key, value in ENVIRONMENT.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    ran = subprocess.run(
        [sys.executable, "-c", ROUNDS], capture_output=True, text=True, env=plain | of_user, check=True
    )
    first, *later = map(int, ran.stdout.split())
    assert first > 20_000
    # a small thing may take its place among what was freed, and a tensor need another place, a few times
    assert all(faults < 500 if kept else faults > 20_000 for faults in later[-4:]), later

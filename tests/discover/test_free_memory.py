"""What a scheduler or a container grants of a machine's memory, by the files that Linux tells it in."""

from pathlib import Path

from sptnet.discover.free_memory import UNKNOWN, free_memory

GB = 10**9


def told(root: Path, lines: str, available: int = 100) -> tuple[Path, Path]:
    proc, groups = root / "proc", root / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable: {available * GB // 1024} kB\n")
    (proc / "self" / "cgroup").write_text(lines)
    return proc, groups


def grant(group: Path, limit: str, used: int, cached: int, version: int) -> None:
    group.mkdir(parents=True, exist_ok=True)
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}
    first, second = names[version]
    (group / first).write_text(f"{limit}\n")
    (group / second).write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 3\n{'total_' * (version == 1)}inactive_file {cached}\n")


def test_a_group_of_version_2_and_those_above_it(tmp_path):
    proc, groups = told(tmp_path, "0::/slurm/job_7/step_0\n")
    assert abs(free_memory(proc, groups) - 100 * GB) < 2000
    grant(groups / "slurm/job_7/step_0", "max", 5 * GB, 0, 2)
    assert abs(free_memory(proc, groups) - 100 * GB) < 2000
    grant(groups / "slurm/job_7", f"{40 * GB}", 30 * GB, 6 * GB, 2)  # files that were read are given back
    assert free_memory(proc, groups) == 16 * GB
    grant(groups, f"{12 * GB}", 2 * GB, 0, 2)  # as within a container
    assert free_memory(proc, groups) == 10 * GB


def test_a_group_of_version_1(tmp_path):
    proc, groups = told(tmp_path, "3:cpu,cpuacct:/job\n2:memory,hugetlb:/job\n0::/\n")
    grant(groups / "memory/job", f"{8 * GB}", 3 * GB, GB, 1)
    assert free_memory(proc, groups) == 6 * GB


def test_where_nothing_is_told(tmp_path):
    assert free_memory(tmp_path, tmp_path) == UNKNOWN

"""How much memory is free here, within what a scheduler or a container grants."""

from collections.abc import Iterator
from pathlib import Path

UNKNOWN = 8e9  # bytes, where the system does not tell


def free_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that nobody uses, of this machine and of every cgroup that this process is in."""
    free = list(_of_groups(proc, groups))
    try:
        lines = dict(line.split(":") for line in (proc / "meminfo").read_text().splitlines())
        free.append(1024.0 * int(lines["MemAvailable"].split()[0]))
    except (OSError, ValueError, KeyError):
        pass
    return min(free, default=UNKNOWN)


def _of_groups(proc: Path, groups: Path) -> Iterator[float]:
    """Of the groups of version 2 and of version 1, each with those above it, which bound it too."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names, cache = groups, ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            root, cache = groups / "memory", "total_inactive_file"
        else:
            continue
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group == root.parent:
                break
            yield from _of_group(group, names, cache)


def _of_group(group: Path, names: tuple[str, str], cache: str) -> Iterator[float]:
    """`cache`: what is used by files that were read, which the kernel takes back first."""
    try:
        limit, used = (float((group / name).read_text()) for name in names)  # `max` is no number
        told = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        yield limit - used + float(told[cache])
    except (OSError, ValueError, KeyError):
        return

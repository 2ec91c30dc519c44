"""What this machine is, in words that name nobody: for reports and for the results of benchmarks."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

__all__ = ["cpu_name", "first_line", "memory_bytes", "nvidia_driver", "processor_seconds"]


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """The size of the main memory, or None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def nvidia_driver() -> str:
    """The version of NVIDIA's driver, or an empty string where there is none."""
    path = shutil.which("nvidia-smi")
    return first_line([path, "--query-gpu=driver_version", "--format=csv,noheader"]) if path else ""


def first_line(command: list[str]) -> str:
    """The first line that a command prints; an empty string when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else ""


def processor_seconds() -> tuple[float, float] | None:
    """Seconds that all processors have worked since the machine's start, and those of this process and its children.

    None where the system does not say.
    """
    try:
        words = Path("/proc/stat").read_text().splitlines()[0].split()
        user, nice, system, _, _, interrupts, soft, stolen = (int(word) for word in words[1:9])
    except (OSError, ValueError, IndexError):
        return None
    at_work = (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")
    return at_work, sum(os.times()[:4])

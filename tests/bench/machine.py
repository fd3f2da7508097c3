"""The machine: its name, the memory of this process, and whether anyone else is computing (Linux)."""
import ctypes
import gc
import os
import re
import time
from pathlib import Path

CORES = len(os.sched_getaffinity(0))
LOOK = .5  # seconds of a look at the machine
QUIET, NOISE = .10, .05  # shares of the machine: wait while more is busy; flag a repeat in which others used more


def name() -> str:
    "Processor model and number of cores."
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    return f"{found[1].strip() if found else os.uname().machine}, {CORES} cores"


def _status(key: str) -> float:
    return int(re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) * 1024 / 1e6


def resident() -> float:
    "Resident memory of this process in MB, after freed memory went back to the system; the high-water mark starts anew from it."
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def high_water() -> float:
    "Most resident memory since `resident`, as the kernel recorded it (VmHWM), in MB."
    return _status("VmHWM")


def die_with_parent() -> None:
    "Ask the kernel to kill this process when its parent ends, however it ends."
    ctypes.CDLL(None).prctl(1, 9)


def busy() -> float:
    "Seconds of processor time used on the whole machine since it started, all cores together."
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own() -> float:
    "Seconds of processor time used by this process and its children."
    import psutil
    total = 0.
    for p in [(me := psutil.Process()), *me.children(recursive=True)]:
        try: total += sum(p.cpu_times()[:2])
        except psutil.NoSuchProcess: pass
    return total


def wait_until_quiet(most: float) -> float:
    "Wait until the machine was idle for a whole look, at most `most` seconds; gives the seconds waited."
    start = time.monotonic()
    while True:
        before, since = busy(), time.monotonic()
        time.sleep(LOOK)
        waited = time.monotonic() - start
        if (busy() - before) / (time.monotonic() - since) < QUIET * CORES or waited > most: return waited


class Watch:
    "Tells whether others computed while it was open."

    def __enter__(self):
        self.start = busy() - own(), time.monotonic()
        return self

    def __exit__(self, *_):
        foreign, seconds = busy() - own() - self.start[0], time.monotonic() - self.start[1]
        self.noisy = foreign > NOISE * CORES * seconds + .05  # the kernel counts in hundredths of a second

"""What each process measures of its own steps. Imports nothing of this project: TRL's interpreters read it, too."""

import os
import time
from collections import defaultdict

REST = "rest"  # of a step: reading data, statistics, logs


class Meter:
    """Seconds of steps and of the phases in them, and memory. On a GPU whoever looks at the clock waits for it first,
    so that each phase is charged with the work that it launched."""

    def __init__(self, device):
        self.cuda = device == "cuda"
        self.steps, self.cpu, self.phases, self.built_bytes = [], [], [], None

    def wait(self):
        if self.cuda:
            import torch

            torch.cuda.synchronize()

    def weigh(self):
        """The models stand: what is held now is theirs."""
        self.built_bytes = self._held()

    def start(self):
        """The first step begins."""
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
        self._open()

    def enter(self, phase):
        """What follows is this phase's. A phase may be entered again."""
        self.wait()
        now = time.perf_counter()
        self._spent[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def step(self, phases=None):
        """A step is done. Its phases are those that were entered, or given: {name: seconds}."""
        self.enter(REST)
        self.steps.append(self._since - self._began)
        self.cpu.append(time.process_time() - self._began_cpu)
        phases = phases or {name: seconds for name, seconds in self._spent.items() if name != REST}
        self.phases.append(phases | {REST: self.steps[-1] - sum(phases.values())})
        self._open()

    def row(self):
        return {
            "seconds": self.steps,
            "cpu_seconds": self.cpu,
            "phases": self.phases,
            "built_bytes": self.built_bytes,
            "peak_bytes": self._peak(),
        }

    def _open(self):
        self.wait()
        self._spent, self._phase = defaultdict(float), REST
        self._began = self._since = time.perf_counter()
        self._began_cpu = time.process_time()

    def _held(self):
        if self.cuda:
            import torch

            return torch.cuda.memory_allocated()
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    def _peak(self):
        """Linux counts a process's peak from the start of its program; ru_maxrss begins with what its parent held."""
        if self.cuda:
            import torch

            return torch.cuda.max_memory_allocated()
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) * 1024


def end(rows, lengths, eos):
    """Sampled rows with the EOS id as their token number `length` and nowhere before it."""
    return [[*(min(i, eos - 1) for i in row[: n - 1]), eos, *row[n:]] for row, n in zip(rows, lengths)]

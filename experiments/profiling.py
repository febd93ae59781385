"""A trace of some steps by jax.profiler, for TensorBoard, XProf or ui.perfetto.dev."""

from __future__ import annotations

import sys
from pathlib import Path

import jax

SKIPPED = 3  # steps: the first compiles, the next fill queues


class Profile:
    """Records `steps` steps into a folder, after the first three of the run."""

    def __init__(self, folder: Path, steps: int):
        self.folder, self._steps, self._seen, self._running = folder, steps, 0, False

    def before_step(self) -> None:
        """To be called before each step."""
        if self._seen == SKIPPED:
            jax.profiler.start_trace(str(self.folder))
            self._running = True
        elif self._seen == SKIPPED + self._steps:
            self.close()
        self._seen += 1

    def close(self) -> None:
        """Ends the recording, also when the run ends before its steps are done."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
        elif self._seen <= SKIPPED:
            print(f"warning: --profile begins after {SKIPPED} steps, and there were {self._seen}", file=sys.stderr)

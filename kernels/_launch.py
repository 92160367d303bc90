"""Launch configurations: one frozen record, ladders over the width of a row, no tuning at run time."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

VECTOR_BYTES = 16  # the widest access of one thread


@dataclass(frozen=True)
class RowConfig:
    """How many threads walk a row, and how many 16-byte vectors each takes in a step."""

    threads: int
    vectors: int = 2  # keeps 32 KB a multiprocessor in flight from 1024 resident threads on: latency times bandwidth

    def options(self, device: torch.device) -> dict[str, int]:
        """The compiler's options on ``device``."""
        options = {"num_warps": max(1, self.threads // warp_size(device))}
        if self.threads >= 512 and nvidia(device):
            # Left alone, ptxas may spill to fit one more program than latency or L2 call for.
            options["maxnreg"] = 65536 // self.threads
        return options


Ladder = tuple[tuple[float, RowConfig], ...]  # (widest row in bytes, configuration)

# One pass: a narrow row gets few threads, so that merging their states does not outweigh the row. From 256
# on, more would only make that merge costlier: other rows fill the chip.
ONE_PASS: Ladder = (
    (4 << 10, RowConfig(32)),
    (32 << 10, RowConfig(128)),
    (float("inf"), RowConfig(256)),
)

# One pass over two tiles: one vector of each is as much under way, in as many registers.
PAIR: Ladder = tuple((widest, RowConfig(config.threads, 1)) for widest, config in ONE_PASS)

# Two passes: the second is to find the row in L2, so the rows in flight have to fit there. Of an H200's 50
# MB, three quarters usable, each of 132 multiprocessors has 280 KB for its 2048 threads: 2048 / threads *
# bytes must not pass that. With 1024 threads and more than 32 registers there is one row per multiprocessor.
# Wider rows (float32 at a 128k vocabulary) come from memory twice whatever is chosen, and do better with more
# programs.
TWO_PASSES: Ladder = (
    (4 << 10, RowConfig(32)),
    (16 << 10, RowConfig(128)),
    (32 << 10, RowConfig(256)),
    (64 << 10, RowConfig(512)),
    (320 << 10, RowConfig(1024)),
    (float("inf"), RowConfig(512)),
)


def row_config(ladder: Ladder, columns: int, dtype: torch.dtype, states: int) -> RowConfig:
    """The configuration for rows of ``columns`` of which every vector keeps ``states`` running numbers."""
    config = next(config for widest, config in ladder if columns * dtype.itemsize <= widest)
    # The states of a second vector would spill: float64 takes two registers for each, and 1024 threads have
    # but 64.
    if dtype == torch.float64 or (config.threads == 1024 and states > 4):
        return RowConfig(config.threads, 1)
    return config


def nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


@functools.cache
def warp_size(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32

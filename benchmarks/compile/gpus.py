"""GPUs of the time model: seconds to multiply, to move bytes and to issue instructions."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Tiles of cuBLAS' products, from the names of the kernels that an H100 ran, and the numbers of
# parts that it may split their inner size into.
TILES = ((128, 256), (256, 128), (192, 192), (128, 192), (192, 128))
SPLITS = (1, 2, 4, 8)
THREADS = 32  # of a warp
SCHEDULERS = 4  # of a processor: each issues one instruction of one warp per clock
# Exponentials, logarithms, reciprocals: 16 lanes of a processor's 128 (CUDA C++ Programming Guide,
# throughput of arithmetic instructions, capabilities 8.0 and 9.0): 8 clocks of a scheduler each.
SPECIAL_CLOCKS = 8
# From the end of a kernel to the start of the next in one stream, assumed.
LAUNCH = 2e-6


@dataclass(frozen=True)
class Gpu:
    """Rates in units per second."""

    name: str
    target: int  # compute capability as the compiler has it
    processors: int
    clock: float
    flops: float  # bf16 product, dense, as a large one reaches it
    copy: float  # bytes of device memory read and written
    l2: float  # bytes that all processors together read from L2
    l2_bytes: int

    def moving(self, size: float) -> float:
        """Seconds to move so many bytes of device memory."""
        return size / self.copy

    def computing(self, pairs: float, instructions: float, special: float) -> float:
        """Seconds to issue so many instructions per pair, `special` of them MUFU."""
        clocks = max(instructions, SPECIAL_CLOCKS * special)
        return pairs / THREADS * clocks / (self.processors * SCHEDULERS * self.clock)

    def product(self, m: int, n: int, k: int, moved: float) -> float:
        """Seconds of a bf16 product (m, k) by (k, n) that moves so many bytes of device memory.

        The longer of its arithmetic, in whole waves of tiles over the processors, and its bytes.
        """
        best = math.inf
        for rows, columns in TILES:
            a_tile = 2 * rows * columns * k / (self.flops / self.processors)
            tiles = math.ceil(m / rows) * math.ceil(n / columns)
            for splits in SPLITS:
                arithmetic = math.ceil(tiles * splits / self.processors) * a_tile / splits
                partial = 0 if splits == 1 else self.moving(2.0 * splits * m * n * 4)
                best = min(best, max(arithmetic, self.moving(moved)) + partial)
        return best


GPUS = {
    # 132 processors and 50 MB of L2: NVIDIA H100 white paper. 1.755 GHz is what a loaded card is
    # taken to hold, below its boost of 1.98 GHz. 790 of 989 TFLOP/s and 3.0 of 3.35 TB/s were
    # measured on an H100 SXM. L2 as the A100's 5120 bytes a clock, for want of a published figure.
    "H100": Gpu("H100", 90, 132, 1.755e9, 790e12, 3.0e12, 5120 * 1.755e9, 50 * 10**6),
    # The H100's processors, faster memory: 4.35 of 4.8 TB/s, as `_scale` moved 3.87 GB of a trained
    # head in 0.889 ms (results/gpu_second_h200.json). On an H100 it took 1.299 ms, a copy's rate.
    "H200": Gpu("H200", 90, 132, 1.755e9, 790e12, 4.35e12, 5120 * 1.755e9, 50 * 10**6),
    # 108 processors, 40 MB of L2 that gives 5120 bytes a clock, boost clock 1.41 GHz: NVIDIA A100
    # white paper. 0.8 of the data sheet's 312 TFLOP/s, the share an H100 reaches; 1.8 of 2.04 TB/s,
    # measured (NVIDIA developer forum, "Trouble to reach peak bandwidth of A100", 80 GB SXM).
    "A100": Gpu("A100", 80, 108, 1.41e9, 0.8 * 312e12, 1.8e12, 5120 * 1.41e9, 40 * 10**6),
}

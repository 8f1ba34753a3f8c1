"""Devices that a step's time is predicted for: one table of rates, each with its source.

Sources:
  H100    NVIDIA H100 data sheet and Hopper white paper, SXM5: 989.4 TFLOP/s of dense bf16, 66.9 of
          fp32, 80 GB of HBM3, NVLink 900 GB/s both ways
  A100    NVIDIA A100 data sheet, SXM 80 GB: 312 TFLOP/s of dense bf16, 19.5 of fp32, 2,039 GB/s,
          NVLink 600 GB/s both ways
  DGX     NVIDIA DGX H100 and DGX A100 data sheets: 8 GPUs and, for them, 8 adapters of 400 and of
          200 Gbit/s
  ours    measured on an H100 SXM: benchmarks/results/gpu_first_h100_2.json, stage "ceilings"; the
          memory that torch reports, in its "environment"
  forum   NVIDIA developer forum, "Trouble to reach peak bandwidth of A100"
  NCCL    NVIDIA/nccl at 5067397: src/graph/topo.h has what NVLink carries (SM80_NVLINK_BW and
          SM90_NVLINK_BW, 20.0 and 20.6 GB/s each of 12 and 18 links), src/graph/tuning.cc how long
          a ring takes: ncclTunerConstantsDefaults and ncclTopoTuneModel
  step    ours: the layers of a whole OPSD step of Qwen3-1.7B's shape, 8 sequences at once, took
          1.45 times the sum of their operations: benchmarks/results/gpu_second_h100_2.json, "step"
  titan   pytorch/torchtitan, docs/performance.md of 2024: Llama 3 70B on 64 A100s, FSDP2, 331
          tokens/s on each, 1.14 times the sum
  FA      T. Dao, FlashAttention-2 (arXiv 2307.08691): 50-73 % of an A100's peak; J. Shah et al.,
          FlashAttention-3 (arXiv 2407.08608): FlashAttention-2 uses 35 % of an H100's
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from opsd_train.dry_run.operations import Operation


@dataclass(frozen=True)
class Seconds:
    """Time by what it is spent on."""

    arithmetic: float = 0.0
    memory: float = 0.0
    communication: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.arithmetic + self.memory + self.communication

    @property
    def waits_for(self) -> str:
        """What most of it is spent on."""
        parts = {
            "arithmetic": self.arithmetic,
            "memory traffic": self.memory,
            "communication": self.communication,
        }
        return max(parts, key=parts.__getitem__)

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.arithmetic + other.arithmetic,
            self.memory + other.memory,
            self.communication + other.communication,
        )

    def __mul__(self, times: float) -> Seconds:
        return Seconds(self.arithmetic * times, self.memory * times, self.communication * times)


@dataclass(frozen=True)
class Protocol:
    """How a ring passes data on: a share of the links' bandwidth, and seconds."""

    share: float
    start: float  # of a collective
    step: float  # from rank to rank within a node
    network_step: float  # from node to node


@dataclass(frozen=True)
class Device:
    """Rates in units per second, of one device; bytes are 8 bits."""

    name: str
    memory: float  # bytes
    products: Mapping[int, float]  # operations of a large product, by bytes of an element
    attention: Mapping[int, float]  # the same of fused attention
    bandwidth: float  # bytes of memory, read or written
    link: float  # bytes sent to a device of the same node
    network: float  # bytes sent to another node
    node: int  # devices of a node
    protocols: tuple[Protocol, ...]
    kind: str = "cuda"  # torch's name
    sustained: float = 1.0  # of these rates, what the layers of a whole step hold
    overlaps: bool = True  # communication goes on beside computation
    thin_products: float = 1.0  # share of the bandwidth that products limited by bytes reach
    reduction: float = 1.0  # a reduce-scatter's time over that of an all-gather of as many bytes

    def work(self, operations: Iterable[Operation]) -> Seconds:
        """Seconds of operations in turn: of each its arithmetic or its bytes, the longer."""
        arithmetic = memory = 0.0
        for operation in operations:
            rates = self.attention if operation.kind == "attention" else self.products
            flops = operation.flops / rates[operation.itemsize] if operation.flops else 0.0
            share = self.thin_products if operation.kind == "product" else 1.0
            moving = operation.bytes / (self.bandwidth * share)
            if flops > moving:
                arithmetic += flops
            else:
                memory += moving
        return Seconds(arithmetic / self.sustained, memory / self.sustained)

    def product(self, rows: float, inner: float, columns: float, itemsize: int) -> Seconds:
        """Seconds of a product (rows, inner) by (inner, columns)."""
        moved = itemsize * (rows * inner + inner * columns + rows * columns)
        return self.work([Operation("product", 2 * rows * inner * columns, moved, itemsize)])

    def moving(self, size: float) -> Seconds:
        """Seconds to read or write so many bytes of memory."""
        return Seconds(memory=size / self.bandwidth / self.sustained)

    def gathering(self, size: float, ranks: int) -> float:
        """Seconds of an all-gather over `ranks` devices that gives each `size` bytes.

        A ring: every device sends (ranks - 1) / ranks of the bytes, in ranks - 1 steps. In a node
        with as many adapters as devices there are as many rings, each through another adapter.
        """
        if ranks == 1:
            return 0.0
        nodes = -(-ranks // self.node)
        rate = self.link if nodes == 1 else min(self.link, self.node * self.network)
        sent = size * (ranks - 1) / ranks
        return min(
            sent / (rate * p.share)
            + p.start
            + (ranks - nodes) * p.step
            + (nodes - 1) * p.network_step
            for p in self.protocols
        )

    def scattering(self, size: float, ranks: int) -> float:
        """Seconds of a reduce-scatter over `ranks` devices of `size` bytes on each."""
        return self.reduction * self.gathering(size, ranks)


# NCCL: the protocols Simple and LL128 of a ring; it takes the faster.
_NCCL = (Protocol(1.0, 8.4e-6, 3.4e-6, 14.0e-6), Protocol(0.92, 14.0e-6, 1.9e-6, 4.0e-6))

DEVICES = {
    "h100": Device(
        name="H100 SXM",
        memory=79.2 * 2**30,  # ours
        # Ours in bf16. fp32 is PyTorch's default, which is not TF32: the same share of the peak.
        products={2: 790e12, 4: 790 / 989.4 * 66.9e12},
        attention={2: 0.35 * 989.4e12, 4: 0.35 * 66.9e12},  # FA
        sustained=1 / 1.45,  # step
        bandwidth=3.02e12,  # ours
        link=18 * 20.6e9,  # NCCL
        network=400e9 / 8,  # DGX
        node=8,  # DGX
        protocols=_NCCL,
    ),
    "a100": Device(
        name="A100 SXM 80 GB",
        memory=80e9,  # A100
        # A100, by the share of the peak that an H100 reaches (ours).
        products={2: 790 / 989.4 * 312e12, 4: 790 / 989.4 * 19.5e12},
        attention={2: 0.6 * 312e12, 4: 0.6 * 19.5e12},  # FA, the middle
        sustained=1 / 1.14,  # titan
        bandwidth=1.8e12,  # forum
        link=12 * 20.0e9,  # NCCL
        network=200e9 / 8,  # DGX
        node=8,  # DGX
        protocols=_NCCL,
    ),
}
"""The devices by the name that --device takes."""

"""--dry-run: the resolved config, the loss plan, memory and time, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping

from opsd_kernels import plan
from opsd_train.config.load import to_yaml
from opsd_train.config.schema import Config
from opsd_train.data.teacher_cache import WRITE
from opsd_train.dry_run.devices import DEVICES, Device
from opsd_train.dry_run.largest_step import cache_is_there
from opsd_train.dry_run.memory import PhaseMemory
from opsd_train.dry_run.prediction import Prediction, peak, predict_run
from opsd_train.dry_run.setup import teachers_of

_MIB, _GIB = 2**20, 2**30


def dry_run(
    config: Config, shard: str = "full", ranks: int | None = None, device: str | None = None
) -> str:
    """Check the recipe, its data and prompts; return the text that --dry-run prints.

    No weights are loaded and nothing is written. `ranks`: the number of processes, by default that
    of torchrun's. `device`: one of `DEVICES`, for which time is predicted too. Raises UserError for
    a recipe that cannot be run.
    """
    found = predict_run(config, shard, ranks, DEVICES[device] if device else None)
    step, sizes = found.step, found.sizes
    options = {"grad_weight": sizes.rank == 0, **found.setup.loss}
    loss_plan = plan(step.largest.loss_tokens, sizes.hidden, sizes.vocab, **options)
    return "\n".join(
        [
            to_yaml(config).rstrip(),
            "",
            f"{step.problems} problems; longest prompt {step.longest_prompt} tokens; micro-batches "
            f"of up to {max(step.largest.tokens, step.largest.teacher_tokens)} tokens; "
            f"{sizes.trained:,} trained parameters",
            f"loss plan: {loss_plan}",
            *_memory(found),
            *_engine(config),
            *_elsewhere(config),
            *_time(found),
        ]
    )


def expected(config: Config, shard: str = "full") -> Mapping[str, PhaseMemory]:
    """The expected peak memory of each phase of the recipe's run, on the rank with the most."""
    return predict_run(config, shard).most


def _memory(found: Prediction) -> list[str]:
    if found.unknown:
        kinds = ", ".join(found.unknown)
        return [f"memory: not predicted; only layers like Llama's are, not {kinds}"]
    ranks, where = found.setup.processes, found.device.name if found.device else None
    each = f" by each of {ranks} ranks" if ranks > 1 else ""
    heading = f"memory expected on {where or found.setup.loss['device']}{each}, without Python and "
    peaks = sorted(map(peak, found.memory))
    lines = [f"{heading}the libraries:", *_table(found.most)]
    if peaks[0] < peaks[-1]:
        least, most = (f"{size / _MIB:,.0f}" for size in (peaks[0], peaks[-1]))
        lines.append(f"  ranks differ: peaks of {least} to {most} MiB")
    return lines + (_fits(found, found.device) if found.device else [])


def _fits(found: Prediction, device: Device) -> list[str]:
    """Whether the device's memory is enough, beside vLLM's share of it."""
    rollout, most = found.config.rollout, peak(found.most)
    room = device.memory
    if rollout.engine == "vllm":
        room *= 1 - rollout.vllm_memory
    share = f"{most / _GIB:.1f} of {room / _GIB:.1f} GiB"
    return [f"  fits: {share}" if most <= room else f"  does not fit: {share}"]


def _table(phases: Mapping[str, PhaseMemory]) -> list[str]:
    most = peak(phases)
    lines = []
    for name, phase in phases.items():
        mark = "  <- the most" if phase.total == most else ""
        lines.append(f"  {name:44}{phase.total / _MIB:10,.0f} MiB{mark}")
        for part, size in phase.parts.items():
            if size:
                lines.append(f"    {part:42}{size / _MIB:10,.0f}")
    return lines


def _time(found: Prediction) -> list[str]:
    if not found.seconds or found.device is None:
        return []
    ranks, batches = found.setup.processes, len(found.step.micro_batches)
    lines = [
        f"time predicted for a step on {ranks} x {found.device.name}, {batches} "
        f"micro-batch{'es' if batches > 1 else ''} each, without Python and the start of kernels, "
        "which small steps wait for:"
    ]
    for name, phase in found.seconds.items():
        parts = (phase.arithmetic, phase.memory, phase.communication)
        shares = "{:.0%} arithmetic, {:.0%} memory traffic, {:.0%} communication".format(
            *(part / phase.total for part in parts)
        )
        lines.append(f"  {name:12}{phase.total:10.3f} s   waits for {phase.waits_for}: {shares}")
    seconds = found.step_seconds
    rate = found.step.loss_tokens / seconds
    lines.append(f"  {'step':12}{seconds:10.3f} s   {rate:,.0f} completion tokens/s")
    if found.config.rollout.engine != "transformers" and found.setup.teacher:
        lines.append("  the rollout is vLLM's, and not in it")
    return lines


def _engine(config: Config) -> list[str]:
    """Where vLLM generates."""
    rollout = config.rollout
    if rollout.engine == "vllm":
        return [f"  vLLM takes another {rollout.vllm_memory:.0%} of the device while it generates"]
    if rollout.engine == "vllm-server":
        when = ", a step ahead" if rollout.ahead else ""
        return [f"rollouts: on {', '.join(rollout.servers)}{when}; they take no memory here"]
    return []


def _elsewhere(config: Config) -> list[str]:
    """Where the teachers are that are not in memory."""
    served = [
        f"the teacher {teacher.teacher} is asked on {', '.join(teacher.servers)}; it is not loaded"
        for teacher in teachers_of(config).values()
        if teacher.servers
    ]
    return served + [
        f"the teacher {teacher.teacher} is read from {teacher.cache}; "
        + ("it is not loaded" if cache_is_there(teacher.cache) else f"not there yet: {WRITE}")
        for teacher in teachers_of(config).values()
        if teacher.cache is not None
    ]

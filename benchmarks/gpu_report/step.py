"""A whole OPSD optimizer step, seconds by phase and peak memory: opsd_kernels and plain logits.

The model is random, of Qwen3-1.7B's shape, with LoRA and gradient checkpointing. The teacher is the
model without its adapters and reads a longer prompt. Both contenders train the same model, in turn,
step by step.
"""

from __future__ import annotations

import functools
import gc
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_report.job import Emit, GpuJob, Row
from benchmarks.gpu_report.work import leave_if_lost, message
from benchmarks.losses import eager
from benchmarks.train_step.meters import Memory, Phases
from opsd_kernels import fused_linear_jsd

BETA, TEMPERATURE = 0.5, 1.1  # as in the paper's recipe for this model
_LORA = {
    "r": 64,
    "lora_alpha": 128,
    "target_modules": [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")],
}
QWEN3_17B = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
TINY = QWEN3_17B | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 131,
}


@dataclass(frozen=True)
class Settings:
    """`at_once`: sequences in a micro-batch; contenders are compared at each of these."""

    sequences: int = 8
    completion: int = 1024
    student_prompt: int = 256
    teacher_prompt: int = 1024
    at_once: tuple[int, ...] = (8, 2)
    steps: int = 3  # measured; one more is the warm-up
    dtype: str = "bfloat16"


_SMALL = Settings(2, 8, 4, 6, (2, 1), 1, "float32")
# (student, teacher, head) -> mean divergence; the first two are hidden states or logits.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """`logits`: the loss takes logits, else hidden states."""

    name: str
    loss: Loss
    logits: bool


def shards(job: GpuJob) -> list[list[str]]:
    """Each contender with each micro-batch, in one process."""
    settings = _SMALL if job.small else Settings()
    return [[f"{c.name}, {n} at once" for n in settings.at_once for c in contenders()]]


def contenders() -> list[Contender]:
    """opsd_kernels, and full logits with TRL's loss or, without TRL, a plain one."""
    plain = Contender("plain logits", _plain_loss, True)
    if trl_loss() is not None:
        plain = Contender("plain logits, TRL's loss", _trl_loss, True)
    return [Contender("opsd_kernels", _fused_loss, False), plain]


@functools.cache
def trl_loss() -> Callable[..., Tensor] | None:
    """TRL's JSD on logits; None if TRL cannot be imported."""
    try:
        from trl.experimental.gkd import GKDTrainer
    except (ImportError, RuntimeError):  # TRL or one of its requirements is missing
        return None
    return GKDTrainer.generalized_jsd_loss


def _fused_loss(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    return fused_linear_jsd(student, head, teacher, head, beta=BETA, temperature=TEMPERATURE)


def _plain_loss(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    log_s, log_t = ((z.float() / TEMPERATURE).log_softmax(-1) for z in (student, teacher))
    return eager.divergence(log_s, log_t, BETA).mean()


def _trl_loss(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    flat = (z.flatten(0, 1) for z in (student, teacher))
    return trl_loss()(*flat, beta=BETA, temperature=TEMPERATURE)


def work(ids: list[str], job: GpuJob, emit: Emit) -> None:
    """A row per contender and micro-batch size, in the format of `benchmarks.train_step`."""
    run = StepRun(_SMALL if job.small else Settings(), job)
    for at_once in run.settings.at_once:
        wanted = {f"{c.name}, {at_once} at once": c for c in contenders()}
        rows = run.compare({i: c for i, c in wanted.items() if i in ids}, at_once)
        for row in rows:
            emit(row)
        if any("failed" in row for row in rows):
            leave_if_lost()


class StepRun:
    """The model, its optimizer and a batch of random tokens."""

    def __init__(self, settings: Settings, job: GpuJob) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, Qwen3Config

        self.settings, self.device = settings, job.device
        torch.manual_seed(0)
        config = Qwen3Config(**(TINY if job.small else QWEN3_17B))
        self.dtype = getattr(torch, settings.dtype)
        with torch.device(job.device):
            model = AutoModelForCausalLM.from_config(
                config, dtype=self.dtype, attn_implementation="sdpa"
            )
        enable = getattr(model, "activation_checkpointing_enable", None)  # its name from 5.2x on
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        self.model = get_peft_model(model, LoraConfig(**_LORA)).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=2e-5)
        tokens = settings.completion, settings.student_prompt, settings.teacher_prompt
        completion, student, teacher = (
            torch.randint(config.vocab_size, (settings.sequences, n), device=job.device)
            for n in tokens
        )
        self.student, self.teacher = (torch.cat([p, completion], 1) for p in (student, teacher))
        self.phases, self.memory = Phases(), Memory(job.device)

    def compare(self, wanted: dict[str, Contender], at_once: int) -> list[Row]:
        """A warm-up step, then rounds of one step per contender; out of memory is a result too."""
        steps: dict[str, list[dict[str, Any]]] = {name: [] for name in wanted}
        out: list[Row] = []
        for number in range(1 + self.settings.steps):
            for name, contender in wanted.items():
                if any(row["id"] == name for row in out):
                    continue
                try:
                    step = self.measure(contender, at_once)
                except torch.OutOfMemoryError as error:
                    why = f"out of memory with {at_once} sequences at once"
                    what = "absent" if contender.logits else "failed"
                    out.append({"id": name, what: f"{why}: {message(error)}"[:300]})
                except Exception as error:
                    out.append({"id": name, "failed": message(error)})
                else:
                    steps[name] += [step] if number else []
        for name, found in steps.items():
            if found:
                out.append({"id": name, "found": self._summary(found, at_once)})
        return out

    def measure(self, contender: Contender, at_once: int) -> dict[str, Any]:
        """Seconds, phases, memory and loss of one step."""
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.memory.start()
        self.phases.start()
        loss = self.step(contender, at_once)
        seconds, phases = self.phases.stop()
        return {"seconds": seconds, "phases": phases, "loss": loss, **self.memory.stop()}

    def step(self, contender: Contender, at_once: int) -> float:
        """One optimizer step over all sequences; returns the loss."""
        head = self.model.get_output_embeddings().weight
        total = torch.zeros((), device=self.device)
        parts = zip(self.student.split(at_once), self.teacher.split(at_once), strict=True)
        for student_ids, teacher_ids in parts:
            with self.phases.of("teacher forward"), torch.no_grad():
                with self.model.disable_adapter():
                    teacher = self.forward(teacher_ids, contender.logits)
            with self.phases.of("student forward"):
                student = self.forward(student_ids, contender.logits)
            with self.phases.of("loss"):
                loss = contender.loss(student, teacher, head)
                loss = loss * (len(student_ids) / self.settings.sequences)
            del student, teacher
            with self.phases.of("backward"):
                loss.backward()
            total += loss.detach()
        with self.phases.of("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
        return total.item()

    def forward(self, ids: Tensor, logits: bool) -> Tensor:
        """Logits or last hidden states at the positions that predict the completion."""
        core, kept = self.model.get_base_model(), self.settings.completion + 1
        # peft keeps adapters in float32; autocast computes them in the model's dtype.
        low = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype if low else None, enabled=low):
            if logits:
                return core(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[:, :-1]
            hidden = core.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            return hidden[:, -kept:-1]

    def _summary(self, steps: list[dict[str, Any]], at_once: int) -> dict[str, Any]:
        names = [name for name in steps[0]["phases"] if any(s["phases"][name] for s in steps)]
        peaks = {
            key: None if steps[0][key] is None else statistics.median(s[key] for s in steps)
            for key in ("peak_extra_mib", "peak_mib")
        }
        return peaks | {
            "settings": asdict(self.settings) | {"at_once": at_once, "beta": BETA},
            "phases": {name: [s["phases"][name] for s in steps] for name in names},
            "seconds": [s["seconds"] for s in steps],
            "loss": [s["loss"] for s in steps],
            "loss_tokens": self.settings.sequences * self.settings.completion,
        }

"""Hidden states of a real pair: SmolLM2-135M as student and as teacher that sees the solution.

    python -m benchmarks.real_pair

Samples completions of the demo's training problems, runs the model over them under the student's
and the teacher's prompt, and keeps the last hidden states of 1024 completion tokens with the head
in benchmarks/.cache/real_pair.pt (about 60 MB, ignored by git). About a minute on 2 cores.
"""

from __future__ import annotations

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.losses.inputs import REAL_PAIR
from opsd_kernels.integrations.heads import lm_head
from opsd_train.config.load import config_from, load_recipe
from opsd_train.data.layout import make_batch
from opsd_train.data.problems import load_problems
from opsd_train.data.prompts import PromptBuilder
from opsd_train.model.families import completion_hidden
from opsd_train.model.policy import Policy, load_model, load_tokenizer
from opsd_train.rollout import Request, Sampling
from opsd_train.rollout.transformers_engine import TransformersEngine

TOKENS = 1024
_COMPLETION = 48


@torch.no_grad()
def capture(tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    """{"student", "teacher"} (tokens, D), "head" (V, D), "labels" (tokens,): the sampled tokens."""
    config = config_from(load_recipe("demo/opsd"))
    tokenizer, dtype = load_tokenizer(config.model), getattr(torch, config.model.dtype)
    prompts = PromptBuilder(tokenizer, config.prompts)
    model = load_model(config.model, tokenizer, dtype)
    policy = Policy(model, tokenizer.pad_token_id, dtype)
    engine = TransformersEngine(policy, tokenizer, config.rollout)
    held: dict[str, list[torch.Tensor]] = {"student": [], "teacher": [], "labels": []}
    sides = ("student", "teacher")
    problems, count = iter(prompts.filter(load_problems(config.data)[0], sides)), 0
    while count < tokens:
        group = [next(problems) for _ in range(config.problems_per_step)]
        requests = [Request(prompts.student(p), count + i) for i, p in enumerate(group)]
        made = engine.generate(requests, Sampling(_COMPLETION, temperature=1.0))
        completions = [completion.tokens for completion in made]
        for side in sides:
            shown = [getattr(prompts, side)(problem) for problem in group]
            batch = make_batch(shown, completions, tokenizer.pad_token_id, model.device)
            held[side].append(completion_hidden(model, batch))
        held["labels"].append(batch.targets)
        count += len(batch.targets)
    pair = {name: torch.cat(parts)[:tokens].contiguous() for name, parts in held.items()}
    return pair | {"head": lm_head(model).weight.detach().clone()}


def main() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    pair = capture()
    REAL_PAIR.parent.mkdir(exist_ok=True)
    torch.save(pair, REAL_PAIR)
    size = REAL_PAIR.stat().st_size / 2**20
    print(f"wrote {REAL_PAIR}: {len(pair['labels'])} tokens, {size:.0f} MiB")


if __name__ == "__main__":
    main()

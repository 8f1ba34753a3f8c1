"""A made-up results.json: drawn outcomes around chosen accuracies, for tests and to look at.

python tests/study/made_up.py FOLDER    # writes FOLDER/results.json
"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np

TASKS = {
    "sums": "sums of two numbers (chain_sum)",
    "products": "products of two numbers (products)",
    "letters": "how often a letter occurs (letter_counting)",
}
START = {"sums": 0.3, "products": 0.12, "letters": 0.35}
# arm -> (label, gain in points of probability, tokens a step, changes)
ARMS = {
    "base": ("before training", 0.0, 0, []),
    "sft": ("SFT on the solutions", 0.10, 0, ["method=sft"]),
    "grpo": ("GRPO, 8 samples", 0.12, 3800, ["method=grpo", "rollout.samples_per_prompt=8"]),
    "star": ("STaR, 8 samples", 0.05, 3900, ["method=star"]),
    "context-distill": ("context distillation", 0.09, 600, ["method=context_distill"]),
    "opsd": ("OPSD, 1 sample", 0.20, 310, []),
    "sampled-token": ("sampled token (Eq. 9)", 0.16, 320, ["loss.objective=sampled_token"]),
    "jsd": ("JSD, beta 0.5", 0.19, 310, ["loss.beta=0.5"]),
    "length-5": ("5 tokens", 0.08, 80, ["rollout.max_new_tokens=5"]),
    "length-40": ("40 tokens", 0.22, 600, ["rollout.max_new_tokens=40"]),
}
STEPS = range(0, 41, 5)


def made_up(problems: int = 198, seeds: int = 3, tasks: list[str] | None = None) -> dict:
    """Three tasks, five experiments; one run failed and one is missing."""
    tasks = tasks or list(TASKS)
    results = {
        "name": "full",
        "command": "python -m benchmarks.study",
        "commit": "e2ecd41aa",
        "date": "2026-11-25 01:10",
        "device": "AMD EPYC, 2 cores, 23.5 GiB",
        "versions": {"torch": "2.13.0+cpu", "transformers": "5.23.0", "peft": "0.21.2"},
        "seconds": 0.0,
        "tasks": {
            task: {
                "label": TASKS[task],
                "problems": problems,
                "majority": {"answer": "3", "accuracy": 0.05 if task != "letters" else 1 / 3},
            }
            for task in tasks
        },
        "runs": {
            f"{task}-{arm}-s{seed}": run(task, arm, seed, problems)
            for task in tasks
            for arm in ARMS
            if arm != "base"
            for seed in range(seeds)
        },
        "samplings": {},
        "experiments": [],
        "memory": memory(),
        "notes": {
            "methods": "A hand-written note: GRPO has few groups with both right and wrong samples "
            "on products, so most of its steps have nothing to learn from."
        },
    }
    results["seconds"] = sum(run["seconds"]["total"] for run in results["runs"].values())
    for arm in ("base", "length-5", "opsd", "length-40"):
        for task in tasks:
            name = f"length-{task}-{arm}"
            results["samplings"][name] = sampling(task, arm, problems)
    results["experiments"] = experiments(tasks, seeds)
    return results


def broken(results: dict) -> dict:
    """The same with one run failed, one missing and one sampling failed."""
    results["runs"]["letters-star-s1"] |= {
        "status": "failed",
        "error": "RuntimeError: out of memory",
        "evaluations": results["runs"]["letters-star-s1"]["evaluations"][:1],
    }
    del results["runs"]["products-jsd-s2"]
    results["samplings"]["length-sums-length-5"] |= {"status": "failed", "scores": None}
    return results


def run(task: str, arm: str, seed: int, problems: int) -> dict:
    _, gain, tokens, changes = ARMS[arm]
    hardness = _random(task).uniform(-0.15, 0.15, problems)
    luck = _random(task, arm, seed).normal(0, 0.02)
    rows = []
    for step in STEPS:
        chance = START[task] + hardness + (gain + luck) * (1 - np.exp(-step / 15))
        draws = _random(task, "base" if step == 0 else f"{arm} {seed} {step}").random(problems)
        right = draws < np.where(step == 0, START[task] + hardness, chance)
        rows.append(
            {
                "step": step,
                "tokens": tokens * step,
                "accuracy": float(right.mean()),
                "interval": [0.0, 1.0],
                "correct": "".join("01"[int(r)] for r in right),
                "problems": problems,
                "length": 18.0,
                "seconds": 3.1 * step,
            }
        )
    teacher = {"accuracy": 0.52, "interval": [0.45, 0.59], "correct": 103, "problems": problems}
    spent = {"load": 4.0, "rollout": tokens / 60, "student": 60.0, "evaluate": 35.0}
    where = f"output_dir=runs/study/{task}-{arm}-s{seed}"
    words = " ".join([*changes, f"data.task={task}", f"seed={seed}", where])
    return {
        "task": task,
        "arm": arm,
        "seed": seed,
        "command": f"python -m opsd_train demo/opsd {words}",
        "status": "finished",
        "error": None,
        "steps": 40,
        "tokens": 40 * tokens,
        "seconds": spent | {"total": sum(spent.values())},
        "peak_memory_mib": 1450.0 + len(arm),
        "evaluations": rows,
        "teacher": teacher if arm == "opsd" and seed == 0 else None,
        "diagnostics": diagnostics(task) if arm == "opsd" else None,
    }


def diagnostics(task: str) -> dict:
    def shares(task_share: float) -> dict:
        shares = {"task": task_share, "style": 0.9 - task_share, "end": 0.1}
        return {
            "count": 900,
            "of_tokens": {"task": 0.4, "style": 0.55, "end": 0.05},
            "of_divergence": shares,
        }

    places = list(range(1, 21))
    return {
        "position": {
            "start": {
                "steps": [1, 10],
                "positions": places,
                "means": [0.3 / (1 + i / 4) + 0.01 * len(task) for i in places],
            },
            "end": {
                "steps": [31, 40],
                "positions": places,
                "means": [0.1 / (1 + i / 4) + 0.01 for i in places],
            },
        },
        "kinds": {"all": shares(0.35), "start": shares(0.3), "end": shares(0.42)},
        "tokens": [["To", 0.61, 40, "style"], [" =", 0.4, 88, "task"], ["\n", 0.2, 9, "style"]],
        "completions": 120,
    }


def sampling(task: str, arm: str, problems: int, samples: int = 8) -> dict:
    random = _random(task, arm, "sampling")
    chance = (START[task] + ARMS[arm][1]) * random.beta(1.2, 1.2, problems) * 1.5
    return {
        "run": None if arm == "base" else f"{task}-{arm}-s0",
        "task": task,
        "seed": 0,
        "command": f"python -m opsd_train eval runs/study/{task}-{arm}-s0",
        "status": "finished",
        "scores": {"problems": problems, "samples": samples},
        "correct": random.binomial(samples, chance.clip(0, 1)).tolist(),
    }


def experiments(tasks: list[str], seeds: int) -> list[dict]:
    def arm(name: str, sampled: bool = False) -> dict:
        made = {"name": name, "label": ARMS[name][0], "changes": ARMS[name][3]}
        if name != "base":
            made["runs"] = {t: [f"{t}-{name}-s{seed}" for seed in range(seeds)] for t in tasks}
        if sampled:
            made["samplings"] = {task: [f"length-{task}-{name}"] for task in tasks}
        return made

    def experiment(name, title, paper, says, question, kind, arms, contrasts, ahead=()) -> dict:
        return {
            "name": name,
            "title": title,
            "paper": paper,
            "paper_says": says,
            "question": question,
            "kind": kind,
            "command": f"python -m benchmarks.study --only {name}",
            "arms": arms,
            "contrasts": contrasts,
            "paper_ahead": list(ahead),
        }

    methods = ["base", "sft", "grpo", "star", "context-distill", "opsd"]
    versus = [["opsd", other] for other in methods[:-1]]
    return [
        experiment(
            "methods",
            "OPSD beside the other methods",
            "Table 2",
            "OPSD is ahead of SFT at every size, ahead of or level with GRPO at 4B and 8B.",
            "From the same problems, what does each method make of the model?",
            "accuracy",
            [arm(name) for name in methods],
            versus,
            [["opsd", "base"], ["opsd", "sft"], ["opsd", "grpo"]],
        ),
        experiment(
            "tokens",
            "Accuracy for the tokens generated",
            "Figure 3",
            "OPSD needs several times fewer generated tokens than GRPO.",
            "How many tokens must each generate for the same held-out accuracy?",
            "tokens",
            [arm("grpo"), arm("opsd")],
            [["opsd", "grpo"]],
            [["opsd", "grpo"]],
        ),
        experiment(
            "objectives",
            "Full vocabulary, sampled token, and which divergence",
            "Table 3",
            "The full vocabulary is ahead of the sampled token by about two points.",
            "Does the whole distribution teach more than the sampled token?",
            "accuracy",
            [arm(name) for name in ("base", "sampled-token", "opsd", "jsd")],
            [["opsd", "sampled-token"], ["opsd", "jsd"]],
            [["opsd", "sampled-token"]],
        ),
        experiment(
            "memory",
            "Peak memory of the full-vocabulary objective",
            "Section 4.3.3",
            "The full vocabulary costs peak memory: a trade-off.",
            "What is left of that price when the logits are never stored?",
            "memory",
            [],
            [],
        ),
        experiment(
            "length",
            "Length of the student's samples",
            "Figure 4",
            "Longer samples give a higher pass@k.",
            "Does the teacher's word on more tokens teach more?",
            "passk",
            [arm(name, sampled=True) for name in ("base", "length-5", "opsd", "length-40")],
            [["opsd", "length-5"], ["length-40", "opsd"]],
            [["opsd", "length-5"], ["length-40", "opsd"]],
        ),
    ]


def memory() -> dict:
    points = []
    for power in range(8, 16):
        tokens = 2**power
        for method, slope in (("ours", 0.35), ("plain", 2.6)):
            predicted = tokens > (4096 if method == "ours" else 2048)
            mib = 900 + slope * tokens
            points.append({"tokens": tokens, "method": method, "mib": mib, "predicted": predicted})
    return {
        "points": points,
        "note": "Peak memory of one OPSD step, SmolLM2-135M, LoRA; beyond 4,096 tokens predicted.",
        "command": "python -m benchmarks.study.step_memory",
    }


def _random(*names: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32("/".join(map(str, names)).encode()))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(broken(made_up())))

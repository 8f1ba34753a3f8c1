"""Small results as the benchmark writes them, for the tests of what is made from them."""

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.report.__main__ import main
from benchmarks.report.data import Device
from benchmarks.report.files import load

ROOT = Path(__file__).parents[2]
SHAPES = {"small": (64, 1000), "large": (128, 9000), "larger": (512, 9000)}
README = """# Title
<!-- benchmark: losses -->
old figure 123.456
<!-- /benchmark: losses -->
between
<!-- benchmark: train_step -->
<!-- /benchmark: train_step -->
<!-- benchmark: demo -->
<!-- /benchmark: demo -->
end
"""


def environment(device="Test CPU", kind="cpu", date="2026-01-02 03:04") -> dict:
    return {
        "kind": kind,
        "device": device,
        "cores": 2,
        "threads": 1,
        "memory_gib": 7.5,
        "python": "3.11.7",
        "versions": {"torch": "2.13.0", "trl": None},
        "commit": "0123456789abcdef+",
        "date": date,
    }


def contender(role, seconds, peak=50.0, loss=0.001, gradient=0.01) -> dict:
    # The median is `seconds`; the mean is not.
    samples = [seconds, 9 * seconds, 0.5 * seconds]
    times = {"forward": samples, "backward": samples, "both": [2 * s for s in samples]}
    peaks = None if peak is None else {"forward": 1.0, "backward": 2.0, "both": peak}
    error = {"loss": loss, "grad_hidden": gradient, "grad_weight": None}
    found = {"role": role, "seconds": times, "peak_extra_mib": peaks}
    return found if role == "floor" else found | {"error": error}


def case(shape="small", tokens=256, inputs="random", ours=0.0125, **changes) -> dict:
    hidden, vocab = SHAPES[shape]
    return {
        "id": f"jsd-frozen-bfloat16-{shape}-{tokens}-{inputs}",
        "operation": "jsd",
        "title": "JSD, beta 0.5",
        "head": "frozen",
        "dtype": "bfloat16",
        "shape": shape,
        "tokens": tokens,
        "hidden": hidden,
        "vocab": vocab,
        "inputs": inputs,
        "gemms": 3,
        "rounds": 3,
        "error_rows": tokens,
        "plan": "blocks of 64 rows",
        "contenders": {
            "bare GEMMs": contender("floor", 0.01, peak=11.0),
            "opsd_kernels": contender("ours", ours, peak=44.0),
            "opsd_kernels, shared head": contender("ours", 0.011, peak=33.0),
            "Eager": contender("peer", 0.03, peak=None, loss=-0.048)
            | {"peak_why": "runs in a process of its own"},
            "Chunked <b>": contender("peer", 0.17, peak=1234.0, loss=float("nan")),
            "Triton": {"role": "peer", "why_not": "needs a GPU"},
        },
        **changes,
    }


def losses(*cases, **place) -> dict:
    return {
        "kind": "losses",
        "environment": environment(**place),
        "memory_method": "growth of the peak",
        "seconds": 1.0,
        "cases": list(cases),
        "skipped": [{"id": "jsd-far-too-large", "why": "needs 99 GiB"}],
    }


def train_step() -> dict:
    ours = {"phases": {"rollout": [1.0, 2.0, 9.0], "loss": [0.25]}, "seconds": [4.0, 5.0, 6.0]}
    theirs = {"phases": {"rollout": [2.0], "optimizer": [0.5]}, "seconds": [12.5]}
    return {
        "kind": "train_step",
        "environment": environment(),
        "settings": {"prompts": 16, "micro_batch": 8, "memory_environment": {"THREADS": "1"}},
        "contenders": {
            "opsd_train": ours | {"peak_extra_mib": 700.0, "loss_tokens": 1024, "loss": [1.0, 2.0]},
            "Their trainer": theirs | {"peak_extra_mib": None, "loss_tokens": 1024, "loss": [1.5]},
            "Third": {"why_not": "not installed"},
        },
    }


def demo() -> dict:
    return {
        "kind": "demo",
        "environment": environment(),
        "recipe": "demo/opsd",
        "summary": {
            "status": "finished",
            "steps": 40,
            "before": {"accuracy": 0.12, "interval": [0.082, 0.1723], "problems": 200},
            "after": {"accuracy": 0.295, "interval": [0.2361, 0.3616], "problems": 200},
            "teacher": {"accuracy": 0.71, "interval": [0.6436, 0.7685], "problems": 200},
            "majority": {"answer": "3", "accuracy": 0.035},
            "paired": {"difference": 0.175, "interval": [-0.0177, 0.2423], "gained": 44, "lost": 9},
            "divergence_before": 0.09971,
            "divergence_after": 0.08745,
            "tokens": 11456,
            "peak_memory_mib": 2957.05,
            "seconds": {"load": 18.4, "total": 821.36},
        },
    }


def write_results(folder: Path) -> None:
    """A folder with json/, two devices in it, and a README.md with all the markers."""
    sizes = [("small", 256), ("small", 512), ("large", 512)]
    cpu = [case(shape, tokens) for shape, tokens in sizes] + [case(inputs="close")]
    gpu = [case(tokens=tokens, ours=0.02) for tokens in (1024, 2048)]
    (folder / "json").mkdir()
    write(folder, "cpu", losses(*cpu))
    write(folder, "gpu", losses(*gpu, device="Test GPU", kind="cuda"))
    write(folder, "train_step", train_step())
    write(folder, "demo", demo())
    (folder / "README.md").write_text(README)


def write(folder: Path, name: str, content: dict) -> None:
    (folder / "json" / f"{name}.json").write_text(json.dumps(content))


def change(folder: Path, name: str, edit: Callable[[dict], object]) -> None:
    content = json.loads((folder / "json" / f"{name}.json").read_text())
    edit(content)
    write(folder, name, content)


def run(folder: Path, *more: str) -> int:
    paths = ["--out", str(folder / "out"), "--pages", str(folder / "README.md")]
    return main([str(folder / "json"), *paths, *more])


def device(folder: Path, name: str = "Test CPU") -> Device:
    return next(device for device in load([folder / "json"]) if device.name == name)

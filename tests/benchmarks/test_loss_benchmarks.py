"""The loss benchmarks themselves: what they would miss, and what they say of who is absent."""

import dataclasses
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.losses import cases, peers, runner
from benchmarks.losses import contenders as contenders_module
from benchmarks.losses.cases import SMOLLM2, TINY, Case
from benchmarks.losses.contenders import FLOOR, OURS, SHARED, Contender, contenders
from benchmarks.losses.inputs import Inputs, MissingInputs
from benchmarks.losses.memory import NoMemory, ProcessMemory
from benchmarks.report.tables import suspicious

CPU = torch.device("cpu")
CASE = Case("jsd", "trained", "float32", TINY, 48)


def measured(monkeypatch, *extra: Contender, case: Case = CASE, patience: float = 9.0) -> dict:
    """One case with further contenders at the end."""
    everyone = [c for c in contenders(case, CPU) if c.role != "peer"] + list(extra)
    monkeypatch.setattr(runner, "contenders", lambda *_: everyone)
    return runner.measure(case, CPU, NoMemory(), budget=0.0, patience=patience)["contenders"]


def our_call(case: Case = CASE):
    return next(c.call for c in contenders(case, CPU) if c.name == OURS)


@pytest.mark.parametrize("factor", [0.0, 2.0, -1.0, float("nan")])
def test_a_wrong_gradient_shows(monkeypatch, factor: float) -> None:
    def wrong(x: Inputs) -> torch.Tensor:
        loss = our_call()(x)
        return loss.detach() + factor * (loss - loss.detach())

    found = measured(monkeypatch, Contender("wrong", "peer", wrong))
    assert suspicious(found["wrong"]["error"])
    assert found["wrong"]["error"]["grad_weight"] != pytest.approx(0, abs=0.5)
    assert not suspicious(found[OURS]["error"])


def test_a_wrong_loss_shows(monkeypatch) -> None:
    found = measured(monkeypatch, Contender("wrong", "peer", lambda x: our_call()(x) + 0.1))
    assert suspicious(found["wrong"]["error"])
    assert abs(found["wrong"]["error"]["grad_hidden"]) < 1e-4


def test_an_error_at_full_size_shows_when_only_some_tokens_are_checked(monkeypatch) -> None:
    from benchmarks.losses import truth

    monkeypatch.setattr(truth, "_CPU_ELEMENTS", 8 * TINY.vocab)

    def late_rows_lost(x: Inputs) -> torch.Tensor:
        if x.student.shape[0] <= 8:
            return our_call()(x)
        kept = torch.arange(x.student.shape[0]) < 24
        student = torch.where(kept[:, None], x.student, x.student.detach())
        part = x.rows(torch.arange(x.student.shape[0]))
        part.student = student
        return our_call()(part)

    found = measured(monkeypatch, Contender("late", "peer", late_rows_lost))
    assert found["late"]["error"]["grad_hidden"] > 0.1
    assert found[OURS]["error"]["grad_hidden"] < 1e-4


def test_who_is_absent_says_why(monkeypatch) -> None:
    def failing(x: Inputs) -> torch.Tensor:
        raise RuntimeError("no such kernel\nand more")

    found = measured(
        monkeypatch,
        Contender("missing", "peer", our_call(), package="no_such_package"),
        Contender("triton", "peer", our_call(), needs_gpu=True),
        Contender("failing", "peer", failing),
        Contender("huge", "peer", our_call(), logits=2**40),
    )
    assert found["missing"]["why_not"] == "no_such_package is not installed"
    assert "needs a GPU" in found["triton"]["why_not"]
    assert found["failing"]["why_not"] == "RuntimeError: no such kernel"
    assert "GiB for its logits" in found["huge"]["why_not"]


def test_a_failure_of_ours_is_not_excused(monkeypatch) -> None:
    def failing(x: Inputs) -> torch.Tensor:
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        measured(monkeypatch, Contender("opsd_kernels, broken", "ours", failing))


def test_every_case_compiles_afresh(monkeypatch) -> None:
    """Ten shapes in one process: Dynamo's limit is eight of one function."""

    @torch.compile(backend="eager", fullgraph=True, dynamic=False)
    def compiled(student: torch.Tensor) -> torch.Tensor:
        return 0 * student.sum()

    peer = Contender("c", "peer", lambda x: our_call()(x) + compiled(x.student), compiles=True)
    for tokens in range(8, 18):
        found = measured(monkeypatch, peer, case=dataclasses.replace(CASE, tokens=tokens))
        assert "why_not" not in found["c"], found["c"]


@pytest.mark.parametrize(("far", "rounds"), [(0.0, 1), (1e9, runner.MIN_ROUNDS)])
def test_a_slow_peer_is_timed_once(monkeypatch, far: float, rounds: int) -> None:
    """Slow: longer than the patience and than so many times ours."""
    monkeypatch.setattr(runner, "_FAR", far)
    monkeypatch.setattr(runner, "_NEAR", 1.0)
    found = measured(monkeypatch, Contender("slow", "peer", our_call()), patience=0.0)
    assert len(found["slow"]["seconds"]["both"]) == rounds
    assert len(found[OURS]["seconds"]["both"]) == runner.MIN_ROUNDS


@pytest.mark.parametrize(
    ("calls", "samples", "far"),
    [
        ([1.9], 1, False),
        ([2.1, 1.9], 2, False),
        ([3.9, 2.1, 2.1], 3, True),
        ([2.1, 2.1, 1.9], 3, False),
        ([4.1], 1, True),
    ],
)
def test_one_slow_call_makes_no_peer_slow(
    monkeypatch, calls: list[float], samples: int, far: bool
) -> None:
    """A machine in its slow state takes twice the time."""
    seconds = iter(calls)
    monkeypatch.setattr(runner, "call", lambda *_: (next(seconds), 0.0, None))
    found = runner.Samples([next(seconds)], [0.0])
    peer = Contender("peer", "peer", our_call())
    assert runner._is_far(peer, Inputs(CASE, CPU), found, limit=2.0) == far
    assert found.forward == calls[:samples]


@pytest.mark.parametrize(("near", "rounds"), [(1.0, runner.MIN_ROUNDS), (1e9, runner.NEAR_ROUNDS)])
def test_a_near_peer_takes_more_rounds(monkeypatch, near: float, rounds: int) -> None:
    """Beside ours and the floor; what else is ours takes no more."""
    monkeypatch.setattr(runner, "_NEAR", near)
    case = dataclasses.replace(CASE, head="frozen")
    found = measured(monkeypatch, Contender("near", "peer", our_call(case)), case=case)
    taken = {name: len(c["seconds"]["forward"]) for name, c in found.items() if "seconds" in c}
    assert taken["near"] == taken[OURS] == taken[FLOOR] == rounds
    assert taken[SHARED] == runner.MIN_ROUNDS


@pytest.mark.parametrize(("on_a_gpu", "sizes"), [(True, [7, 7]), (False, [3, 7])])
def test_on_a_gpu_no_timed_call_compiles(monkeypatch, on_a_gpu: bool, sizes: list[int]) -> None:
    """Most peers compile kernels for the shape: a call of full size goes before the timed one."""
    called = []

    def recorded(contender: Contender, x: SimpleNamespace) -> tuple[float, float, None]:
        called.append(x.tokens)
        return 1.0, 2.0, None

    monkeypatch.setattr(runner, "call", recorded)
    monkeypatch.setattr(runner, "Inputs", lambda case, device: SimpleNamespace(tokens=3))
    student = SimpleNamespace(is_cuda=on_a_gpu, device=None)
    case = SimpleNamespace(small=None)
    x = SimpleNamespace(student=student, case=case, tokens=7, clear=lambda: None)
    check = SimpleNamespace(answers=lambda *_: None)
    assert runner._warm_up(Contender("peer", "peer", our_call()), x, check, {}) == (1.0, 2.0)
    assert called == sizes


def floating_point_operations(x: Inputs) -> int:
    """Of the floor's products, forward and, where there is one, backward."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backward = contenders(x.case, CPU)[0].call(x)
        if x.case.differentiated:
            backward()
    return counter.get_total_flops()


# All rows in one block of the floor's, two even blocks, two and three uneven ones.
@pytest.mark.parametrize("rows", [48, 24, 30, 20])
@pytest.mark.parametrize("head", cases.HEADS)
@pytest.mark.parametrize("operation", ["jsd", "cross_entropy"])
def test_the_floor_multiplies_the_same_whatever_its_blocks(
    monkeypatch, operation: str, head: str, rows: int
) -> None:
    monkeypatch.setattr(contenders_module, "_FLOOR_BYTES", rows * TINY.vocab * 4)
    case = dataclasses.replace(CASE, operation=operation, head=head)
    products = {"frozen": 1, "trained": 2, "no_grad": 0}[head] + (1 if case.models == 1 else 2)
    one = 2 * case.tokens * TINY.hidden * TINY.vocab
    assert floating_point_operations(Inputs(case, CPU)) == products * one == case.operations


@pytest.mark.parametrize("head", cases.HEADS)
def test_the_floor_reads_nothing_back_from_the_device(head: str) -> None:
    """Tensors without data, at the size of a GPU's case: three blocks of 3533, 3533, 1126 rows."""
    case = Case("jsd", head, "bfloat16", cases.QWEN3_8B, 8192)
    x = object.__new__(Inputs)
    x.case = case
    x.student, x.teacher = (torch.empty(8192, 4096, device="meta").bfloat16() for _ in range(2))
    x.head, x.teacher_head = (torch.empty(151936, 4096, device="meta").bfloat16() for _ in "12")
    assert floating_point_operations(x) == case.operations


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_unsloth_peer_is_called_by_its_file_alone(monkeypatch, tmp_path, beta: float) -> None:
    """Its package refuses to be imported without unsloth; beta and the order of heads are ours."""
    folder = tmp_path / "unsloth_zoo" / "fused_losses"
    folder.mkdir(parents=True)
    (tmp_path / "unsloth_zoo" / "__init__.py").write_text("raise ImportError('unsloth first')\n")
    (folder / "fused_linear.py").write_text(
        "from opsd_kernels import reference\n"
        "def fused_linear_jsd(h, w, h_t, w_t, *, beta):\n"
        "    z, z_t = h @ w.T, h_t @ w_t.T\n"
        "    parts = z.log_softmax(-1), z_t.log_softmax(-1)\n"
        "    return reference.divergence(*parts, beta).mean()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    peers._unsloth.cache_clear()
    operation = {0.0: "forward_kl", 0.5: "jsd", 1.0: "reverse_kl"}[beta]
    case = dataclasses.replace(CASE, operation=operation)
    peer = next(c for c in contenders(case, CPU) if c.package == "unsloth_zoo")
    found = measured(monkeypatch, peer, case=case)[peer.name]
    peers._unsloth.cache_clear()
    assert "why_not" not in found and not suspicious(found["error"])
    assert abs(found["error"]["loss"]) < 1e-5


def test_every_peer_of_a_loss_is_listed_and_says_why_it_cannot_run() -> None:
    names = {c.name: c for c in contenders(CASE, CPU)}
    jsd = ("TRL generalized_jsd_loss", "TRL ChunkedDivergenceFunction", "Liger FusedLinearJSD")
    assert {*jsd, "Liger chunked_loss JSD", "unsloth_zoo fused_linear_jsd"} <= set(names)
    entropy = contenders(dataclasses.replace(CASE, operation="cross_entropy"), CPU)
    names |= {c.name: c for c in entropy}
    assert {"Cut Cross-Entropy", "quack chunked_linear_cross_entropy"} <= set(names)
    for contender in names.values():
        if contender.package and not importlib.util.find_spec(contender.package):
            assert contender.why_not(CASE, CPU, 2**40) == f"{contender.package} is not installed"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_sees_full_logits_and_not_ours() -> None:
    case = Case("cross_entropy", "frozen", "float32", dataclasses.replace(TINY, vocab=32768), 512)
    everyone = {c.name: c for c in contenders(case, CPU)}
    x = Inputs(case, CPU)
    with ProcessMemory() as memory:
        # The worker finds the case by its id, which names the shape of the tiny one.
        eager = memory.measure(everyone["PyTorch eager"], x)["peak_extra_mib"]
        ours = memory.measure(everyone[OURS], x)["peak_extra_mib"]
    full = 512 * 32768 * 4 / 2**20
    assert eager["both"] > 1.9 * full
    assert 5 < ours["both"] < 0.9 * full
    assert eager["both"] == max(eager["forward"], eager["backward"])


def test_selections() -> None:
    default = cases.default_cases(CPU)
    assert len({case.id for case in default}) == len(default)
    assert {case.operation for case in default} == set(cases.OPERATIONS)
    assert {case.inputs for case in default} == {"random", "close", "real"}
    full = cases.full_cases(CPU, 24 * 2**30)
    assert {case.id for case in default} <= {case.id for case in full}
    gpu = torch.device("cuda")
    large = cases.full_cases(gpu, 80 * 2**30)
    assert {case.id for case in cases.default_cases(gpu)} <= {case.id for case in large}
    assert max(case.tokens for case in large) == 65536
    assert all(cases.find(case.id) == case for case in (*full, *large))
    with pytest.raises(ValueError, match="unknown case"):
        cases.find("jsd-frozen-bfloat16-gpt2-256-random")


def test_real_inputs_that_are_not_there(monkeypatch, tmp_path) -> None:
    from benchmarks.losses import inputs

    monkeypatch.setattr(inputs, "REAL_PAIR", tmp_path / "absent.pt")
    with pytest.raises(MissingInputs, match=r"benchmarks\.real_pair"):
        Inputs(Case("jsd", "frozen", "bfloat16", SMOLLM2, 256, "real"), CPU)


@pytest.mark.parametrize("operation", list(cases.OPERATIONS))
def test_the_truth_is_the_same_from_parts_of_a_head(monkeypatch, operation: str) -> None:
    from benchmarks.losses import truth

    x = Inputs(dataclasses.replace(CASE, operation=operation), CPU)
    whole = truth.truth(x)
    monkeypatch.setattr(truth, "_HEAD_ELEMENTS", 40 * TINY.hidden)  # 131 entries: the last is short
    parts = truth.truth(x)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-12)
    for name in ("grad_hidden", "grad_weight"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=0, atol=1e-14)

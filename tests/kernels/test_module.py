"""FusedLinearJSD: Liger's call order around fused_linear_jsd."""

import inspect

import pytest
import torch

from opsd_kernels.fused_jsd import FusedLinearJSD, fused_linear_jsd
from opsd_kernels.fused_kl import fused_linear_forward_kl, fused_linear_reverse_kl
from opsd_kernels.ops import common
from opsd_kernels.plan import Plan, plan
from opsd_kernels.testing import make_pair
from tests.helpers.kernel_cases import STUDENT, run

LIGER = ["student_input", "student_weight", "teacher_input", "teacher_weight", "shift_labels"]


def test_call_order_is_ligers() -> None:
    constructor = list(inspect.signature(FusedLinearJSD).parameters)
    assert constructor[:4] == ["jsd_beta", "ignore_index", "temperature", "accum_dtype"]
    forward = list(inspect.signature(FusedLinearJSD.forward).parameters)
    assert forward[1:6] == LIGER
    pair = make_pair(20, 12, 70, masked=3)
    positional = FusedLinearJSD(0.1, -100, 1.5)(*(pair[name] for name in LIGER))
    named = {name: pair[name] for name in LIGER}
    assert torch.equal(positional, fused_linear_jsd(**named, beta=0.1, temperature=1.5))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"jsd_beta": 0.0, "temperature": 0.7},
        {"jsd_beta": 1.0, "ignore_index": 3},
        {"jsd_beta": 0.0, "token_clip": 0.05},
        {"student_logit_scale": 4.0, "teacher_logit_scale": 0.0625},
        {"precision": "fp32", "jsd_beta": 0.3},
        {"reduction": "none", "student_softcap": 8.0, "workspace_bytes": 64 << 20},
    ],
    ids=str,
)
def test_equals_the_function(options: dict[str, float]) -> None:
    pair = make_pair(20, 12, 70, masked=3)
    pair["shift_labels"] = pair["shift_labels"].clamp(
        min=-100 if "ignore_index" not in options else 0
    )
    pair["token_weight"] = torch.linspace(0, 1, 20)
    names = {"beta" if key == "jsd_beta" else key: value for key, value in options.items()}
    ours = run(FusedLinearJSD(**options), pair, STUDENT)
    expected = run(fused_linear_jsd, pair, STUDENT, **names)
    assert torch.equal(ours[0][0], expected[0][0])
    for name in STUDENT:
        assert torch.equal(ours[1][name], expected[1][name])


@pytest.mark.parametrize("wrt", [(), STUDENT[:1], STUDENT], ids=["no", "frozen", "trained"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_precision_reaches_the_plan(
    reduction: str, wrt: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every operator, backward's own call too."""
    asked = []

    def recorded(*sizes: int, precision: str, **options: object) -> Plan:
        asked.append(precision)
        return plan(*sizes, precision=precision, **options)

    monkeypatch.setattr(common, "plan", recorded)
    for fn in (fused_linear_jsd, fused_linear_forward_kl, fused_linear_reverse_kl):
        run(fn, make_pair(5, 6, 11), wrt, reduction=reduction, precision="fp32")
    calls = 6 if wrt == STUDENT and reduction == "none" else 3
    assert asked == ["fp32"] * calls


def test_accum_dtype_is_accepted_and_changes_nothing() -> None:
    pair = make_pair(20, 12, 70, masked=3, dtype=torch.bfloat16)
    expected = fused_linear_jsd(**pair, beta=0.1, temperature=1.5)
    for dtype in (None, torch.bfloat16, torch.float32):
        assert torch.equal(FusedLinearJSD(0.1, -100, 1.5, dtype)(**pair), expected)
    with pytest.raises(TypeError, match="accum_dtype"):
        FusedLinearJSD(0.1, -100, 1.5, 0.05)


def test_options_are_attributes() -> None:
    """Those of the constructor, under its names; setting one changes the loss."""
    module = FusedLinearJSD(0.1, 3, 1.5, token_clip=0.05, student_softcap=8.0)
    given = (module.jsd_beta, module.ignore_index, module.temperature, module.token_clip)
    assert given == (0.1, 3, 1.5, 0.05)
    for name, option in inspect.signature(FusedLinearJSD).parameters.items():
        assert hasattr(module, name), name
        assert getattr(FusedLinearJSD(), name) == option.default
    pair = make_pair(20, 12, 70)
    module.temperature = 0.7
    options = {"beta": 0.1, "ignore_index": 3, "token_clip": 0.05, "student_softcap": 8.0}
    assert torch.equal(module(**pair), fused_linear_jsd(**pair, temperature=0.7, **options))


def test_labels_are_optional_and_num_tokens_is_passed_on() -> None:
    pair = make_pair(20, 12, 70)
    del pair["shift_labels"]
    module = FusedLinearJSD()
    assert torch.equal(module(**pair), fused_linear_jsd(**pair))
    assert torch.equal(module(**pair, num_tokens=37), fused_linear_jsd(**pair, num_tokens=37))
    assert not list(module.parameters()) and not module.state_dict()

"""The kernel of the Hugging Face hub beside the installed package: the same losses, bit for bit."""

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import opsd_kernels
from opsd_kernels.testing import make_pair

ROOT = Path(__file__).parents[3]
SHAPE = (11, 16, 67)
LOSSES = ["jsd", "jsd, trained", "logprob", "cross-entropy, trained"]


def load(name: str, path: Path) -> ModuleType:
    """The module at the path under another name: for a package, the way `kernels` imports it."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "kernel"
    load("hub_kernel", ROOT / "tools/hub_kernel.py").main(out)
    return out


@pytest.fixture(scope="module")
def kernel(folder: Path) -> Iterator[ModuleType]:
    build = folder / "build/torch-cpu"
    name = json.loads((build / "metadata.json").read_text())["id"]
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("triton") and not torch.cuda.is_available():
            # Its kernels are interpreted or not from their import on.
            patch.setenv("TRITON_INTERPRET", "1")
        module = load(name, build / "__init__.py")
        if importlib.util.find_spec("triton"):
            importlib.import_module(f"{name}.backends.triton_backend")
    yield module
    for found in [found for found in sys.modules if found.split(".")[0] == name]:
        del sys.modules[found]


def losses_and_gradients(package: ModuleType, loss: str, device: str) -> list[Tensor]:
    pair = make_pair(*SHAPE, masked=2, seed=1, dtype=torch.float32)
    names = ("student_input", "student_weight", "teacher_input", "teacher_weight", "shift_labels")
    h, w, h_t, w_t, target = (pair[name].to(device) for name in names)
    trained = loss.endswith("trained")
    h.requires_grad_(), w.requires_grad_(trained)
    if loss.startswith("jsd"):
        value = package.fused_linear_jsd(h, w, h_t, w_t, target, beta=0.3)
    elif loss == "logprob":
        value = package.fused_linear_logprob(h, w, target).sum()
    else:
        value = package.fused_linear_cross_entropy(h, w, target, label_smoothing=0.1)
    value.backward()
    return [value.detach(), h.grad, *([w.grad] if trained else [])]


def assert_same(kernel: ModuleType, loss: str, device: str) -> None:
    installed = losses_and_gradients(opsd_kernels, loss, device)
    for ours, theirs in zip(losses_and_gradients(kernel, loss, device), installed, strict=True):
        assert ours.abs().sum() > 0
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.filterwarnings("ignore:opsd_kernels runs in plain PyTorch")
def test_torch_backend(kernel: ModuleType, loss: str, torch_backend: str) -> None:
    assert_same(kernel, loss, "cpu")


@pytest.mark.parametrize("loss", LOSSES)
def test_triton_backend(kernel: ModuleType, loss: str, triton_device: str) -> None:
    assert_same(kernel, loss, triton_device)


def test_operators_have_a_namespace_of_their_own(kernel: ModuleType) -> None:
    losses_and_gradients(kernel, "jsd, trained", "cpu")
    own = getattr(torch.ops, kernel.__name__)
    for operator in ("divergence_sum", "logprob_tokens", "scale_cast"):
        assert (
            getattr(own, operator).default is not getattr(torch.ops.opsd_kernels, operator).default
        )
    mine = [found for found in sys.modules if found.startswith(f"{kernel.__name__}.")]
    assert f"{kernel.__name__}.ops.common" in mine


def test_files(folder: Path) -> None:
    source = folder / "torch-ext/opsd_kernels"
    installed = Path(opsd_kernels.__file__).parent
    names = {str(path.relative_to(installed)) for path in installed.rglob("*.py")}
    names = {name for name in names if not name.startswith("integrations")}
    assert {str(path.relative_to(source)) for path in source.rglob("*.*")} == names
    text = (folder / "build.toml").read_text()
    assert "[torch-noarch]" in text
    for path in folder.rglob("*.py"):
        absolute = r"(?m)^\s*(from|import) opsd_kernels|torch\.ops\.opsd_kernels|\"opsd_kernels::"
        assert not re.search(absolute, path.read_text()), path
    ids = {
        json.loads(path.read_text())["id"] for path in folder.glob("build/torch-*/metadata.json")
    }
    assert len(ids) == 2 and all(re.fullmatch(r"_opsd_kernels_(cpu|cuda)_\w{7}", x) for x in ids)


@pytest.mark.parametrize(
    "line",
    [
        "import opsd_kernels",
        'x = importlib.import_module(name="opsd_kernels.plan")',
        'x = torch.library.Library("opsd_kernels", "DEF")',
    ],
)
def test_what_the_script_does_not_know_is_refused(folder: Path, line: str) -> None:
    with pytest.raises(ValueError, match=r"opsd_kernels/ops/new\.py:2: opsd_kernels"):
        sys.modules["hub_kernel"].kernel_source(Path("ops/new.py"), f"import torch\n{line}\n")

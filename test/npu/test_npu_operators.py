"""Every operator of the emulator against the CPU, with arguments that are not the defaults.

A definition whose signature differs from torch_npu's call reads other memory than it should: these
tests would see it. On a card they compare the real kernels.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from helpers import rounding
from npu import counters

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
BIG, SMALL = 0.7, 0.3


@pytest.fixture(autouse=True)
def only_beside_the_cpu(device):
    if device.type == "cpu":
        pytest.skip("compares a device with the CPU; run with --device npu")


def values(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator)


def numbers(high, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, shape, generator=generator)


A, B, C = values(3, 4, 5), values(3, 4, 5, seed=1), values(3, 4, 5, seed=2)
POSITIVE = A.abs() + 0.1
MASK, OTHER_MASK = A > 0, B > 0
INDEX = numbers(4, 3, 2, 5)
IMAGE = values(2, 3, 9, 9)
FILTERS, BIAS = values(4, 3, 3, 3, seed=3), values(4, seed=4)
LEFT, RIGHT = values(2, 3, 4), values(2, 4, 5)
SORTED = torch.randperm(60, generator=torch.Generator().manual_seed(5)).float().reshape(3, 20)
ROW = torch.tensor([2, 0])

FORWARD = {
    "Abs": lambda a: a.abs(), "Ceil": lambda a: a.ceil(), "Exp": lambda a: a.exp(),
    "Expm1": lambda a: a.expm1(), "IsFinite": lambda a: torch.isfinite(a / a.relu()),
    "Neg": lambda a: -a, "Relu": lambda a: a.relu(), "InplaceRelu": lambda a: a.clone().relu_(),
    "Sigmoid": lambda a: a.sigmoid(), "Sign": lambda a: a.sign(), "Tanh": lambda a: a.tanh(),
    "Adds": lambda a: torch.add(a, 2, alpha=3), "Subs": lambda a: torch.sub(a, 2, alpha=3),
    "Rsubs": lambda a: 2 - a, "Muls": lambda a: a * 0.3, "Divs": lambda a: a / 0.3,
    "InplaceAdds": lambda a: a.clone().add_(2, alpha=3), "EqScalar": lambda a: a.ceil() == 1,
    "NeScalar": lambda a: a.ceil() != 1, "GtScalar": lambda a: a > BIG,
    "GeScalar": lambda a: a >= BIG, "LtScalar": lambda a: a < BIG, "LeScalar": lambda a: a <= BIG,
    "PowTensorScalar": lambda a: a.pow(3), "Clamp": lambda a: a.clamp(-SMALL, BIG),
    "InplaceLeakyRelu": lambda a: F.leaky_relu(a.clone(), 0.1, inplace=True),
    "InplaceMuls": lambda a: a.clone().mul_(BIG),
    "Softplus": lambda a: F.softplus(a, 2, 1), "InplaceZero": lambda a: a.clone().zero_(),
    "InplaceOne": lambda a: torch.ones_like(a), "InplaceFillScalar": lambda a: a.clone().fill_(2.5),
    "ReduceSum": lambda a: a.sum((0, 2), keepdim=True), "Mean": lambda a: a.mean((0, 2)),
    "Max": lambda a: a.max(), "Min": lambda a: a.min(), "Amax": lambda a: a.amax((0, 2)),
    "MaxDim": lambda a: a.max(1, keepdim=True), "LinalgVectorNorm": lambda a: a.norm(1, dim=2),
    "InplaceTriu": lambda a: a.clone().triu_(1), "Cat": lambda a: torch.cat([a, a[:, :1]], 1),
    "Stack": lambda a: torch.stack([a, a], 1), "ConstantPadNd": lambda a: F.pad(a, (1, 2), value=3),
    "LogSoftmax": lambda a: a.log_softmax(1), "Softmax": lambda a: a.softmax(1),
    "InplaceCopy": lambda a: a.transpose(0, 2).contiguous(), "Nonzero": lambda a: (a > 0).nonzero(),
    "All": lambda a: (a > 0).all(1), "Any": lambda a: (a > 1).any(1),
    "Log": lambda a: a.abs().log(),
    "InplaceSqrt": lambda a: a.abs().sqrt_(), "NonzeroV2": lambda a: a[a > 0],
    "ArgMax": lambda a: a.argmax(1), "Flip": lambda a: a.flip(1), "Floor": lambda a: a.floor(),
}
"""Of one tensor, by the operator that torch_npu should call."""

SEVERAL = {
    "Reciprocal": (lambda a: a.reciprocal(), POSITIVE),
    "BitwiseNot": (lambda a: ~a, MASK),
    "BitwiseAndTensor": (lambda a, b: a & b, MASK, OTHER_MASK),
    "BitwiseOrTensor": (lambda a, b: a | b, MASK, OTHER_MASK),
    "Add": (lambda a, b: torch.add(a, b, alpha=2), A, B),
    "Sub": (lambda a, b: torch.sub(a, b, alpha=2), A, B),
    "Mul": (lambda a, b: a * b[0], A, B), "Div": (lambda a, b: a / b, A, POSITIVE),
    "Maximum": (torch.max, A, B), "Minimum": (torch.min, A, B),
    "NeTensor": (lambda a, b: a.ceil() != b.ceil(), A, B),
    "GeTensor": (lambda a, b: a >= b, A, B), "LtTensor": (lambda a, b: a < b, A, B),
    "InplaceAdd": (lambda a, b: a.clone().add_(b, alpha=2), A, B),
    "InplaceSub": (lambda a, b: a.clone().sub_(b, alpha=2), A, B),
    "InplaceMul": (lambda a, b: a.clone().mul_(b[0]), A, B),
    "InplaceDiv": (lambda a, b: a.clone().div_(b), A, POSITIVE),
    "InplaceAddcmul": (lambda a, b, c: a.clone().addcmul_(b, c, value=2), A, B, C),
    "InplaceAddcdiv": (lambda a, b, c: a.clone().addcdiv_(b, c, value=2), A, B, POSITIVE),
    "SWhere": (torch.where, MASK, A, B),
    "IsClose": (lambda a, b: torch.isclose(a, b, 0.2, 0.1), A, B),
    "Equal": (lambda a, b: torch.tensor([torch.equal(a, a), torch.equal(a, b)]), A, B),
    "InplaceMaskedFillScalar": (lambda a, m: a.clone().masked_fill_(m, 7), A, MASK),
    "MaskedSelect": (torch.masked_select, A, MASK),
    "Topk": (lambda a: a.topk(3, dim=0, largest=False), SORTED),
    "Sort": (lambda a: a.sort(dim=0, descending=True), SORTED),
    "Gather": (lambda a, i: a.gather(1, i), A, INDEX),
    "InplaceScatter": (lambda a, b, i: a.clone().scatter_(1, i[:, :1], b), A, B, INDEX),
    "IndexSelect": (lambda a, i: a.index_select(1, i), A, ROW),
    "IndexAdd": (lambda a, i: a.index_add(1, i, a[:, :2], alpha=2), A, ROW),
    "Index": (lambda a, i: a[:, i, 1:3], A, ROW),
    "IndexPutImpl": (lambda a, i: a.clone().index_put_((i,), a[:2], accumulate=True), A, ROW),
    "Matmul": (torch.matmul, LEFT, RIGHT), "BatchMatMul": (torch.bmm, LEFT, RIGHT),
    "Mm": (torch.mm, LEFT[0], RIGHT[0]),
    "Addmm": (lambda c, a, b: torch.addmm(c, a, b, beta=2, alpha=3), values(3, 5), LEFT[0],
              RIGHT[0]),
    "InplaceLogicalAnd": (lambda a, b: a.clone().logical_and_(b), MASK, OTHER_MASK),
    "ScatterAdd": (lambda a, b, i: a.scatter_add(1, i, b), A, B, INDEX),
    "ForeachNonFiniteCheckAndUnscale": (lambda *given: unscaled(given), A, B / 0 + A),
    "Convolution": (functools.partial(F.conv2d, stride=2, padding=(1, 2), dilation=(1, 2)),
                    IMAGE, FILTERS, BIAS),
    "MaxPool2dWithMask": (lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True), IMAGE),
    "UpsampleBilinear2d": (lambda x: F.interpolate(x, (5, 20), mode="bilinear",
                                                   align_corners=True), IMAGE),
}
"""Of several tensors: function and arguments."""

CLASSES = numbers(5, 12)
TRAINED = {
    "ThresholdBackward": (F.relu, A), "SigmoidBackward": (torch.sigmoid, A),
    "TanhBackward": (torch.tanh, A),
    "LeakyReluBackward": (lambda a: F.leaky_relu(a, 0.1), A),
    "SoftplusBackward": (lambda a: F.softplus(a, 2, 1), A),
    "LogSoftmaxBackward": (lambda a: a.log_softmax(1), A),
    "SoftmaxBackward": (lambda a: a.softmax(1), A),
    "ConvolutionBackward": (functools.partial(F.conv2d, stride=2, padding=1), IMAGE, FILTERS, BIAS),
    "BatchNormBackward": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True, 0.1, 1e-3),
                          IMAGE, values(3), values(3, seed=1)),
    "MaxPool2dWithMaskBackward": (lambda x: F.max_pool2d(x, 3, 2, 1), IMAGE),
    "UpsampleBilinear2dBackwardV2": (
        lambda x: F.interpolate(x, (5, 20), mode="bilinear", align_corners=False), IMAGE),
    "NLLLossBackward": (lambda x, y: F.nll_loss(
        x.log_softmax(1), y, ignore_index=2, reduction="sum"), values(12, 5), CLASSES),
    "CrossEntropyLossGrad": (lambda x, y, w: cross_entropy(x, y, w), values(12, 5), CLASSES,
                             values(5).abs()),
    "SmoothL1LossBackward": (lambda x, y: F.smooth_l1_loss(x, y, reduction="sum"), A, B),
    "BinaryCrossEntropyWithLogitsBackward": (
        lambda x, y: F.binary_cross_entropy_with_logits(x, y.sigmoid().detach()), A, B),
}
"""Functions and arguments whose gradients are compared, too."""

CREATED = {
    "Arange": lambda device: torch.arange(3, 20, 4, device=device),
    "InplaceFillScalar": lambda device: torch.full((3,), 2.5, device=device),
}


def cross_entropy(logits, labels, weight):
    """By the plugin's operator where the logits are on an NPU; without the weights' gradient."""
    weight = weight.detach()
    if logits.device.type != "npu":
        return F.cross_entropy(logits, labels, weight, ignore_index=2, reduction="none")
    return torch.ops.npu.npu_cross_entropy_loss(logits, labels, weight, "none", 2)[0]


def unscaled(gradients):
    """Copies of the gradients times a half, and whether one was not finite."""
    copies = [x.clone() for x in gradients]
    found = torch.zeros(1, device=copies[0].device)
    half = torch.full((1,), 0.5, device=found.device)
    torch._amp_foreach_non_finite_check_and_unscale_(copies, found, half)
    return copies + [found]


def assert_equal(found, wanted):
    if isinstance(wanted, torch.Tensor):
        found, wanted = [found], [wanted]
    for left, right in zip(found, wanted):
        assert left.dtype == right.dtype
        torch.testing.assert_close(left.cpu(), right, rtol=rounding.product(1e-5),
                                   atol=rounding.product(1e-6))


def on(device, arguments):
    return [x.to(device) for x in arguments]


def run_all(device, name):
    """Results on the CPU and on the device of the comparison called `name`."""
    if name in FORWARD:
        return FORWARD[name](A), FORWARD[name](A.to(device))
    if name in SEVERAL:
        function, arguments = SEVERAL[name][0], SEVERAL[name][1:]
        return function(*arguments), function(*on(device, arguments))
    if name in CREATED:
        return CREATED[name]("cpu"), CREATED[name](device)
    function, arguments = TRAINED[name][0], TRAINED[name][1:]
    return (trained(function, arguments), trained(function, on(device, arguments)))


def trained(function, arguments):
    """Result and gradients."""
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in arguments]
    result = function(*leaves)
    weight = torch.linspace(0.5, 1.5, result.numel()).reshape(result.shape).to(result.device)
    (result * weight).sum().backward()
    return [result.detach()] + [x.grad for x in leaves if x.requires_grad and x.grad is not None]


OF_INFINITIES = ("ForeachNonFiniteCheckAndUnscale", "IsFinite")
NAMES = sorted({*FORWARD, *SEVERAL, *CREATED, *TRAINED})


@pytest.mark.parametrize("name", NAMES)
def test_operator_equals_the_cpu(device, name):
    if name in OF_INFINITIES:
        rounding.skip_where_saturated()
    wanted, found = run_all(device, name)
    assert_equal(found, wanted)


def test_random_numbers_have_their_distribution(device):
    torch.manual_seed(1)
    normal = torch.empty(20000, device=device).normal_(2, 3).cpu()
    uniform = torch.empty(20000, device=device).uniform_(-1, 3).cpu()
    assert abs(normal.mean() - 2) < 0.1 and abs(normal.std() - 3) < 0.1
    assert uniform.min() >= -1 and uniform.max() <= 3 and abs(uniform.mean() - 1) < 0.05


def test_batch_norm_updates_its_statistics(device):
    layer = torch.nn.BatchNorm2d(3, momentum=0.3)
    other = torch.nn.BatchNorm2d(3, momentum=0.3).to(device)
    assert_equal(other(IMAGE.to(device)).detach(), layer(IMAGE).detach())
    assert_equal(other.running_mean, layer.running_mean)
    assert_equal(other.running_var, layer.running_var)
    assert_equal(other.eval()(IMAGE.to(device)).detach(), layer.eval()(IMAGE).detach())


def test_every_emulated_operator_is_compared(device):
    if device.type != "npu" or not counters.available():
        pytest.skip("only the emulator counts its operators")
    rounding.skip_where_saturated()  # torch_npu calls others there
    counters.reset()
    for name in NAMES:
        run_all(device, name)
    test_random_numbers_have_their_distribution(device)
    test_batch_norm_updates_its_statistics(device)
    assert counters.emulated() - set(counters.operators()) == set()
    assert set(NAMES) - set(counters.operators()) == set(), "names that torch_npu does not call"


DEFINITION = re.compile(r"^(?:// (?P<above>.+)\n)?(?P<macro>[A-Z_]+)\((?P<name>\w+),"
                        r"(?:.*\) +// (?P<beside>.+))?", re.MULTILINE)


def test_sources_are_those_torch_npu_names(device):
    """Each definition is marked with the file that calls it; torch_npu's own errors name it."""
    if device.type != "npu" or not counters.available():
        pytest.skip("only the emulator has definitions")
    rounding.skip_where_saturated()  # torch_npu calls others there
    marked = {}
    for path in (ROOT / "test/npu/emulator/operators").glob("*.cpp"):
        for found in DEFINITION.finditer(path.read_text()):
            prefix = "Inplace" if found["macro"].endswith("_INPLACE") else ""
            marked[prefix + found["name"]] = found["beside"] or found["above"]
    asked = subprocess.run([sys.executable, "test/npu/operator_sources.py"], cwd=str(ROOT),
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert asked.returncode == 0, asked.stderr[-2000:]
    named = dict(line.split(" ", 1) for line in asked.stdout.splitlines()
                 if not line.startswith("Warning"))
    assert {name: marked[name] for name in named} == named

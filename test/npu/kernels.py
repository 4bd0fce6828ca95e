"""Which processor of an Ascend card runs a ready-made operator: its cores or its auxiliary CPU.

CANN decides in an operator's host part, by data type, and for some by shape. The tables say what
its open sources say for 910A (DAV_1001; `jit_compile` off) and 910B (DAV_2201, and so A3):
`KERNELS` has the types for which a kernel runs on the cores, `ROUTES` the kernels that a call of
`aclnnX` comes to, casts among them. Sources are folders in hicann's ops-math, ops-nn and ops-cv at
tag v9.0.0. Operators that torch_npu has compiled (aclop, as of the deformable convolution) are not
in here. Nothing of this was measured on a card.
"""

from __future__ import annotations

import functools
import operator
import re
from typing import Callable, Dict, FrozenSet, List, NamedTuple, Optional, Sequence, Tuple

import torch

SOCS = ("910B", "910A")
CORE, AUXILIARY, UNKNOWN = "core", "auxiliary CPU", "unknown"

SHORT = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i8": torch.int8,
         "u8": torch.uint8, "i16": torch.int16, "i32": torch.int32, "i64": torch.int64,
         "bool": torch.bool}
NAMED = {"Float": "f32", "Half": "f16", "BFloat16": "bf16", "Char": "i8", "Byte": "u8",
         "Short": "i16", "Int": "i32", "Long": "i64", "Bool": "bool"}

PROFILED = {"FLOAT": "f32", "FLOAT16": "f16", "DT_BF16": "bf16", "INT8": "i8", "UINT8": "u8",
            "INT16": "i16", "INT32": "i32", "INT64": "i64", "BOOL": "bool"}
"""What torch_npu's profiler calls the types."""


class Tensor(NamedTuple):
    """An argument of a call."""

    type: str
    """A key of `SHORT`."""
    sizes: Tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.type}[{','.join(map(str, self.sizes))}]"


class Kernel(NamedTuple):
    """One kernel of a call."""

    name: str
    type: str
    """That it computes in; of a cast, where it comes from."""
    target: str = ""
    """Of a cast: where it leads."""

    def __str__(self) -> str:
        return f"{self.name} {self.type}" + (f" to {self.target}" if self.target else "")


class Row(NamedTuple):
    """Types for which a kernel runs on the cores; None where it never runs elsewhere."""

    source: str
    types_910a: Optional[FrozenSet[str]] = None
    types_910b: Optional[FrozenSet[str]] = None


def _row(source: str, types_910a: str, also_910b: str = "") -> Row:
    first = frozenset(types_910a.split())
    return Row(source, first, first | frozenset(also_910b.split()))


KERNELS: Dict[str, Row] = {
    "Abs": _row("ops-math math/abs", "f32 f16 bf16 i32", "i64"),
    "Add": _row("ops-math math/add", "f32 f16 i32 bool i8 u8 i64", "bf16"),
    "Addcmul": _row("ops-math math/addcmul", "f32 f16 bf16 i32"),
    "ArgMaxWithValue": Row("ops-math math/arg_max_with_value"),
    "BatchMatMul": Row("ops-nn matmul"),
    "BatchNorm": Row("ops-nn norm/batch_norm_v3"),
    "BatchNormGrad": Row("ops-nn norm/batch_norm_grad_v3"),
    "BitwiseAnd": _row("ops-math math/bitwise_and", "i16 i32", "i64"),
    "BitwiseOr": _row("ops-math math/bitwise_or", "i16 i32", "i64"),
    "ClipByValueV2": _row("ops-math conversion/clip_by_value_v2", "f16 f32 i32 i64 bf16"),
    "ConcatD": Row("ops-math conversion/concat_d"),
    "Convolution": Row("ops-nn conv/convolution_forward"),
    "ConvolutionBackward": Row("ops-nn conv/convolution_backward"),
    "CrossEntropyLoss": Row("ops-nn loss/cross_entropy_loss"),
    "CrossEntropyLossGrad": Row("ops-nn loss/cross_entropy_loss_grad"),
    "Equal": _row("ops-math math/equal", "f32 i32 i64 f16 i8 u8 bool", "bf16"),
    "Exp": _row("ops-math math/exp", "f32 f16", "bf16"),
    "Fill": _row("ops-math conversion/fill", "f32 f16 i32 i64 i8 bool", "bf16"),
    "Expm1": _row("ops-math math/expm1", "f32 f16", "bf16"),
    "GatherElements": _row("ops-nn index/gather_elements", "f32 i32 f16 i8 u8 i16 i64 bf16"),
    "GatherV3": _row("ops-nn index/gather_v3, gather_v2", "f32 f16 i32 i8 u8 i64 i16 bool", "bf16"),
    "Greater": _row("ops-math math/greater", "f32 i32 i64 f16 i8 u8", "bf16"),
    "GreaterEqual": _row("ops-math math/greater_equal", "f32 i32 f16 i8 u8 bf16 i64"),
    "InplaceIndexAdd": _row("ops-nn index/inplace_scatter_add", "f32 f16", "i32 i16 bf16"),
    "Invert": _row("ops-math math/invert", "i16"),
    "LeakyRelu": _row("ops-nn activation/leaky_relu", "f32 f16", "bf16"),
    "LeakyReluGrad": _row("ops-nn activation/leaky_relu_grad", "f32 f16", "bf16"),
    "Less": _row("ops-math math/less", "f32 i32 i64 f16 i8 u8 bool bf16"),
    "LessEqual": _row("ops-math math/less_equal", "i8 u8 i32 i64 f16 f32 bf16"),
    "LogSoftmaxV2": _row("ops-nn activation/log_softmax_v2", "f32 f16 bf16"),
    "LogSoftmaxGrad": Row("ops-nn activation/log_softmax_grad"),
    "LogicalAnd": _row("ops-math math/logical_and", "bool"),
    "LogicalNot": Row("ops-math math/logical_not"),
    "LogicalOr": _row("ops-math math/logical_or", "bool"),
    "LpNormV2": Row("ops-nn norm/lp_norm_v2"),
    "MaskedFill": _row("ops-math conversion/masked_fill", "f32 f16 bool i8 i32 bf16"),
    "MaxPoolWithArgmaxV1": _row("ops-nn pooling/max_pool3d_with_argmax_v2", "f16", "f32"),
    "MaxPoolGradWithArgmaxV1": _row("ops-nn pooling/max_pool3d_grad_with_argmax", "f16", "f32"),
    "Maximum": _row("ops-math math/maximum", "f32 f16 i32 i8 i64 bf16"),
    "Minimum": _row("ops-math math/minimum", "f32 f16 i32 i8 i64 bf16"),
    "Mul": _row("ops-math math/mul", "f32 f16 i32 i8 u8 i64 bool", "bf16"),
    "Neg": _row("ops-math math/neg", "f32 f16 i32 i8 bf16", "i64"),
    "NLLLoss": _row("ops-nn loss/nll_loss", "f32", "bf16"),
    "NLLLossGrad": _row("ops-nn loss/nll_loss_grad", "f32", "bf16"),
    "NotEqual": _row("ops-math math/not_equal", "f32 i32 i64 f16 i8 u8 bool bf16"),
    "Pack": _row("ops-math conversion/pack", "i8 i16 i32 i64 u8 f16 f32 bool bf16"),
    "PadV3": _row("ops-math conversion/pad_v3", "f16 f32 i32", "bf16 i8"),
    "Range": _row("ops-math math/range", "f32 i32 i64 f16", "bf16"),
    "RealDiv": _row("ops-math math/real_div", "f32 f16 bf16 bool"),
    "Reciprocal": _row("ops-math math/reciprocal", "f32 f16 bf16"),
    "ReduceAll": Row("ops-math math/reduce_all"),
    "ReduceSum": _row("ops-math math/reduce_sum", "f32 f16 i32", "i64 bf16"),
    "Relu": Row("ops-nn activation/relu"),
    "ReluGrad": Row("ops-nn activation/relu_grad"),
    "ResizeBilinearV2": _row("ops-cv image/resize_bilinear_v2", "f32 f16 bf16"),
    "ResizeBilinearV2Grad": Row("ops-cv image/resize_bilinear_v2_grad"),
    "ScatterElements": _row("ops-nn index/scatter_elements_v2", "f32 f16 i32 i8 u8", "bf16"),
    "Select": _row("ops-math math/select", "f32 f16 i32 i8 u8 bf16 i64"),
    "Sigmoid": _row("ops-nn activation/sigmoid", "f32 f16 bf16"),
    "SigmoidCrossEntropy": Row("ops-nn loss/sigmoid_cross_entropy_with_logits_v2"),
    "SigmoidCrossEntropyGrad": Row("ops-nn loss/sigmoid_cross_entropy_with_logits_grad_v2"),
    "SigmoidGrad": _row("ops-nn activation/sigmoid_grad", "f32 f16 bf16"),
    "SmoothL1LossGradV2": Row("ops-nn loss/smooth_l1_loss_grad_v2"),
    "SmoothL1LossV2": Row("ops-nn loss/smooth_l1_loss_v2"),
    "SoftmaxV2": _row("ops-nn activation/softmax_v2", "f32 f16 bf16"),
    "Sort": _row("ops-math math/sort", "f16", "f32 bf16"),
    "Sqrt": _row("ops-math math/sqrt", "f32 f16", "bf16"),
    "Sub": _row("ops-math math/sub", "f32 f16 i32 i64 i8 u8 bool", "bf16"),
    "Tanh": Row("ops-math math/tanh"),
    "TanhGrad": _row("ops-math math/tanh_grad", "f32 f16", "bf16"),
    "TopK": _row("ops-math math/topk", "f16", "f32 bf16"),
    "Triu": Row("ops-math conversion/triu"),
    "ViewCopy": _row("ops-math conversion/view_copy", "f16 f32 i8 i16 i32 i64 u8 bool", "bf16"),
    "ZerosLike": _row("ops-math math/zero_op", "i8 i32 i64 u8 f16 f32 bool", "bf16"),
}

CASTS_910A = {
    "f16": "f32 i32 u8 i8 bool", "f32": "f16 i32 bool", "i32": "f16 f32 i8 u8 bool i64",
    "i8": "f16 f32 i32 bool", "u8": "f16 f32 i32 i64", "bool": "f16 f32 i32 u8 i64 i8",
    "i64": "i32 f16 u8 bool",
}
CASTS_910B = {
    "f16": "f32 i32 u8 bf16 i8 bool i16 i64", "f32": "f16 i32 i64 bf16 bool u8 i16 i8",
    "i32": "f16 f32 i8 u8 bool i64 bf16 i16", "i8": "f16 f32 i32 bf16 bool i64 i16 u8",
    "u8": "f16 f32 i32 i64 bf16 i16 i8", "bool": "f16 f32 i32 u8 i64 bf16 i8",
    "i64": "f32 i32 f16 u8 bool bf16 i16 i8", "bf16": "f32 i32 f16 bool i8 u8 i64",
    "i16": "f16 f32 i64 i32 i8 u8",
}
"""From a type, to types. Of equal types there is no kernel."""

WIDEST_SCATTER = 32768
"""On 910A, `scatter_elements.cpp`: elements of 4 bytes along the last axis that fit half a buffer
of 256 KiB; beyond it a kernel only runs on the cores for few indices."""
FEW_INDICES = 30000
LARGEST_GATHER, FEW_GATHERED = 3000 * 1024, 2000
"""`gather_elements.cpp`: bytes of the table, and elements taken from it."""
GATHERED_FREELY = ("i32", "f32", "f16", "bf16")
"""On 910B, `aclnn_gather.cpp`: for these there is a newer kernel without those limits."""

UNAVOIDABLE_910A: Dict[str, Tuple[int, str]] = {
    "ScatterElements i32": (1, "ranks of hard negatives among more priors than fit its buffer"),
}
"""What a training step may leave to the auxiliary CPU of a 910A: the start of the line, how often,
and why. The recipes of YOLACT++ have 57,744 priors; the second sort that could take the scatter's
place compares in float16 there, which cannot tell so many places apart."""

Route = Callable[[str, Sequence[Optional[Tensor]]], List[Kernel]]


def _name(dtype: torch.dtype) -> str:
    return next(short for short, known in SHORT.items() if known == dtype)


def _promoted(*types: str) -> str:
    result = SHORT[types[0]]
    for other in types[1:]:
        result = torch.promote_types(result, SHORT[other])
    return _name(result)


def _casts(found: Sequence[str], wanted: str) -> List[Kernel]:
    return [Kernel("Cast", one, wanted) for one in found if one != wanted]


def _types(tensors: Sequence[Optional[Tensor]]) -> List[str]:
    return [tensor.type for tensor in tensors if tensor is not None]


def plain(name: str) -> Route:
    """One kernel, in the type of the first argument."""
    return lambda soc, tensors: [Kernel(name, _types(tensors)[0])]


def result(name: str) -> Route:
    """One kernel, in the type of the last argument, to which the first is cast."""
    def route(soc: str, tensors: Sequence[Optional[Tensor]]) -> List[Kernel]:
        types = _types(tensors)
        return _casts(types[:1], types[-1]) + [Kernel(name, types[-1])]
    return route


def binary(name: str, on_bools: str = "") -> Route:
    """(x, y) -> result: both are cast to what they promote to, the result to its own type.

    `on_bools` is the kernel for two of them.
    """
    def route(soc: str, tensors: Sequence[Optional[Tensor]]) -> List[Kernel]:
        types = _types(tensors)
        common = _promoted(*types[:2])
        made = "bool" if types[-1] == "bool" else common
        kernel = on_bools if on_bools and common == "bool" else name
        return (_casts(types[:2], common) + [Kernel(kernel, common)]
                + (_casts([made], types[-1]) if len(types) > 2 else _casts([made], types[0])))
    return route


def _copy(soc: str, tensors: Sequence[Optional[Tensor]]) -> List[Kernel]:
    target, source = _types(tensors)[:2]
    return _casts([source], target) + [Kernel("ViewCopy", target)]


def _not(soc: str, tensors: Sequence[Optional[Tensor]]) -> List[Kernel]:
    kind = _types(tensors)[0]
    return [Kernel("LogicalNot" if kind == "bool" else "Invert", kind)]


def _chosen_in_half(name: str) -> Route:
    """Kernels that know float16 alone on 910A, to which their callers round float32 there."""
    def route(soc: str, tensors: Sequence[Optional[Tensor]]) -> List[Kernel]:
        kind = _types(tensors)[0]
        if soc == "910A" and kind == "f32":
            return [Kernel("Cast", "f32", "f16"), Kernel(name, "f16"), Kernel("Cast", "f16", "f32")]
        return [Kernel(name, kind)]
    return route


ROUTES: Dict[str, Route] = {
    "Abs": plain("Abs"), "Add": binary("Add"), "Adds": result("Add"), "All": plain("ReduceAll"),
    "Arange": plain("Range"), "BatchMatMul": plain("BatchMatMul"), "BatchNorm": plain("BatchNorm"),
    "BatchNormBackward": plain("BatchNormGrad"),
    "BinaryCrossEntropyWithLogits": plain("SigmoidCrossEntropy"),
    "BinaryCrossEntropyWithLogitsBackward": plain("SigmoidCrossEntropyGrad"),
    "BitwiseAndTensor": binary("BitwiseAnd", "LogicalAnd"), "BitwiseNot": _not,
    "BitwiseOrTensor": binary("BitwiseOr", "LogicalOr"), "Cat": plain("ConcatD"),
    "Clamp": result("ClipByValueV2"), "ConstantPadNd": plain("PadV3"),
    "Convolution": plain("Convolution"), "ConvolutionBackward": plain("ConvolutionBackward"),
    "CrossEntropyLoss": plain("CrossEntropyLoss"),
    "CrossEntropyLossGrad": plain("CrossEntropyLossGrad"),
    "Div": binary("RealDiv"), "Divs": result("RealDiv"), "EqScalar": plain("Equal"),
    "Exp": plain("Exp"), "Expm1": plain("Expm1"), "Gather": plain("GatherElements"),
    "GeScalar": plain("GreaterEqual"),
    "GeTensor": binary("GreaterEqual"), "GtScalar": plain("Greater"),
    "IndexAdd": plain("InplaceIndexAdd"), "IndexSelect": plain("GatherV3"),
    "InplaceAdd": binary("Add"), "InplaceAddcmul": plain("Addcmul"), "InplaceAdds": result("Add"),
    "InplaceCopy": _copy,
    "InplaceDiv": binary("RealDiv"), "InplaceFillScalar": plain("Fill"),
    "InplaceLeakyRelu": plain("LeakyRelu"), "InplaceMaskedFillScalar": plain("MaskedFill"),
    "InplaceMul": binary("Mul"), "InplaceOne": plain("Fill"), "InplaceRelu": plain("Relu"),
    "InplaceScatter": plain("ScatterElements"), "InplaceSqrt": plain("Sqrt"),
    "InplaceSub": binary("Sub"),
    "InplaceTriu": plain("Triu"), "InplaceZero": plain("ZerosLike"), "LeScalar": plain("LessEqual"),
    "LeakyReluBackward": plain("LeakyReluGrad"), "LinalgVectorNorm": plain("LpNormV2"),
    "LogSoftmax": plain("LogSoftmaxV2"), "LogSoftmaxBackward": plain("LogSoftmaxGrad"),
    "LtScalar": plain("Less"), "LtTensor": binary("Less"), "MaxDim": plain("ArgMaxWithValue"),
    "MaxPool2dWithMask": _chosen_in_half("MaxPoolWithArgmaxV1"),
    "MaxPool2dWithMaskBackward": _chosen_in_half("MaxPoolGradWithArgmaxV1"),
    "Maximum": binary("Maximum"), "Minimum": binary("Minimum"), "Mul": binary("Mul"),
    "Muls": result("Mul"), "NLLLoss": plain("NLLLoss"), "NLLLossBackward": plain("NLLLossGrad"),
    "NeScalar": plain("NotEqual"), "Neg": plain("Neg"), "Reciprocal": plain("Reciprocal"),
    "ReduceSum": result("ReduceSum"), "Rsubs": result("Sub"),
    "SWhere": lambda soc, tensors: [Kernel("Select", _types(tensors)[-1])],
    "ScatterAdd": plain("ScatterElements"), "Sigmoid": plain("Sigmoid"),
    "SigmoidBackward": plain("SigmoidGrad"), "SmoothL1Loss": plain("SmoothL1LossV2"),
    "SmoothL1LossBackward": plain("SmoothL1LossGradV2"), "Softmax": plain("SoftmaxV2"),
    "Sort": _chosen_in_half("Sort"), "Stack": plain("Pack"), "Sub": binary("Sub"),
    "Subs": result("Sub"), "Tanh": plain("Tanh"), "TanhBackward": plain("TanhGrad"),
    "ThresholdBackward": plain("ReluGrad"), "Topk": _chosen_in_half("TopK"),
    "UpsampleBilinear2d": plain("ResizeBilinearV2"),
    "UpsampleBilinear2dBackwardV2": plain("ResizeBilinearV2Grad"),
}


class Call(NamedTuple):
    """A ready-made operator with its tensors, results among them; None for one not given."""

    name: str
    tensors: Tuple[Optional[Tensor], ...]

    def __str__(self) -> str:
        shown = [str(tensor) for tensor in self.tensors[:4] if tensor is not None]
        return f"{self.name} {' '.join(shown)}" + (" .." if len(self.tensors) > 4 else "")


def parse(line: str) -> Call:
    """The call in a line of `counters.take_plans`."""
    name, *texts = line.split()
    tensors: List[Optional[Tensor]] = []
    for text in texts:
        match = re.fullmatch(r"(\w+)\[([\d,]*)\]", text)
        tensors.append(None if match is None else Tensor(
            NAMED[match.group(1)], tuple(int(size) for size in match.group(2).split(",") if size)))
    return Call(name, tuple(tensors))


def kernels_of(call: Call, soc: str) -> List[Tuple[Kernel, str]]:
    """The kernels of a call on a card, and where each runs; one unknown kernel without a route."""
    if call.name not in ROUTES:
        return [(Kernel(call.name, " ".join(_types(call.tensors)[:1])), UNKNOWN)]
    return [(kernel, _place(kernel, call, soc)) for kernel in ROUTES[call.name](soc, call.tensors)]


def place_of_type(name: str, given: str, made: str, soc: str) -> str:
    """Where the table has a kernel of the profiler's, such as "ScatterElementsV2", by the first
    types that it takes and makes in the profiler's words. Nothing is said of shapes.
    """
    known = {_without_version(row): row for row in KERNELS}
    row = "Cast" if name == "Cast" else known.get(_without_version(name))
    if row is None or given not in PROFILED or (row == "Cast" and made not in PROFILED):
        return UNKNOWN
    return _place_by_type(Kernel(row, PROFILED[given], PROFILED.get(made, "")), soc)


def _without_version(name: str) -> str:
    return re.sub(r"V\d+$", "", name)


def _place(kernel: Kernel, call: Call, soc: str) -> str:
    return AUXILIARY if _too_large(kernel, call, soc) else _place_by_type(kernel, soc)


def _place_by_type(kernel: Kernel, soc: str) -> str:
    if kernel.name == "Cast":
        pairs = CASTS_910A if soc == "910A" else CASTS_910B
        return CORE if kernel.target in pairs.get(kernel.type, "").split() else AUXILIARY
    row = KERNELS[kernel.name]
    types = row.types_910a if soc == "910A" else row.types_910b
    return CORE if types is None or kernel.type in types else AUXILIARY


def _too_large(kernel: Kernel, call: Call, soc: str) -> bool:
    """Whether the shape alone sends a kernel to the auxiliary CPU."""
    table, index = call.tensors[0], call.tensors[1] if len(call.tensors) > 1 else None
    if table is None:
        return False
    if kernel.name == "Sort":
        return table.sizes[-1] == 1
    if index is None:
        return False
    if kernel.name == "ScatterElements" and soc == "910A":
        return table.sizes[-1] > WIDEST_SCATTER and _count(index) > FEW_INDICES
    if kernel.name == "GatherElements" and (soc == "910A" or table.type not in GATHERED_FREELY):
        size = _count(table) * torch.empty(0, dtype=SHORT[table.type]).element_size()
        return size > LARGEST_GATHER and _count(index) > FEW_GATHERED
    return False


def _count(tensor: Tensor) -> int:
    return functools.reduce(operator.mul, tensor.sizes, 1)

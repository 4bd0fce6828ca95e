"""Convert a weights file: `python -m utils.convert_weights IN OUT`.

IN may be of any kind that `utils.weights.files` recognises; OUT's ending says what is written:
.pth (a plain state dict, as the original has it), .safetensors or .pdparams.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, BinaryIO, Callable

from utils.cli import ArgumentParser, print_lines, run_main
from utils.errors import UserError, some
from utils.files import write_whole

if TYPE_CHECKING:
    from torch import Tensor

    from utils.weights.files import WeightsFile

KINDS = ("pth", "safetensors", "pdparams")


def convert(source_path: str, target_path: str, kind: str | None = None) -> list[str]:
    """Convert one file; returns sentences about what was read and written.

    The target is written whole or not at all, and replaces no file. Without a `kind` of `KINDS`
    its ending says it.

    Raises:
        UserError: the source is not such a file, the target is there, or its kind cannot be told.
    """
    # Here, as --help and mistakes in flags need not wait for PyTorch.
    from utils.checkpoint import load_for_inference, serialise, state_path
    from utils.weights.files import metadata_of
    from utils.weights.names import paddle_names, published_names
    from utils.weights.paddle import write_pdparams
    from utils.weights.safetensors import write_safetensors

    kind = kind or _kind_of(target_path)
    if os.path.isdir(target_path):
        raise UserError(f"'{target_path}' is a folder, expected the name of a file")
    if os.path.isfile(target_path):
        raise UserError(f"'{target_path}' is there already; remove it, or give another name for "
                        "the result")
    source = load_for_inference(source_path)
    contents = source.contents
    if contents is None:
        raise UserError(
            f"'{source_path}' holds {len(source.tensors)} tensors, but neither a YOLACT network "
            f"nor a ResNet or DarkNet backbone (first: {some(source.tensors)}); give such a "
            "file")
    tensors = (paddle_names if kind == "pdparams" else published_names)(source.tensors)
    metadata = metadata_of(source.config, source.class_names)
    writers: dict[str, Callable[[BinaryIO], Any]] = {
        "pth": lambda stream: stream.write(serialise(tensors)),
        "safetensors": lambda stream: write_safetensors(stream, tensors, metadata),
        "pdparams": lambda stream: write_pdparams(stream, tensors),
    }
    write_whole(target_path, writers[kind])
    lines = _report(source, target_path, kind, tensors)
    if kind == "pth" and contents.is_network and os.path.exists(state_path(target_path)):
        lines.append(f"Warning: {state_path(target_path)} was there before and belongs to other "
                     "weights; remove it")
    elif source.class_names is not None and kind != "safetensors":
        lines.append(f"Class names and configuration do not fit into a .{kind}; .safetensors keeps "
                     "them")
    return lines


def _kind_of(path: str) -> str:
    ending = os.path.splitext(path)[1].lstrip(".").lower()
    if ending in ("pt", "pth"):
        return "pth"
    if ending not in KINDS:
        raise UserError(f"cannot tell from '{path}' what to write; end it in .pth, .safetensors or "
                        ".pdparams, or give --to")
    return ending


def _report(source: WeightsFile, target_path: str, kind: str,
            tensors: dict[str, Tensor]) -> list[str]:
    lines = [f"Read    : {source}, {len(source.tensors)} tensors"]
    if source.renamed:
        lines.append(f"Renamed : {'; '.join(source.renamed)}")
    if source.unused:
        lines.append(f"Unused  : {len(source.unused)} ({some(source.unused)})")
    left = len(source.tensors) - len(tensors)
    if left:
        lines.append(f"Left out: {left} batch counters at 0, which Paddle does not have")
    short = sum(str(value.dtype) == "torch.bfloat16" for value in tensors.values())
    if kind == "pdparams" and short:
        lines.append(f"Widened : {short} bfloat16 tensors to float32")
    return lines + source.warnings + [
        f"Wrote   : {target_path} ({kind}), {len(tensors)} tensors, "
        f"{os.path.getsize(target_path) / 1e6:.1f} MB"]


def main(argv: list[str]) -> int:
    """Command line entry."""
    parser = ArgumentParser(prog="python -m utils.convert_weights",
                            description="Convert weights of a YOLACT network or of a backbone.")
    parser.add_argument("source", metavar="IN", help=".pth, .safetensors, .pdparams, or DarkNet's "
                        ".weights; recognised by content")
    parser.add_argument("target", metavar="OUT", help="file to write; its ending says which kind")
    parser.add_argument("--to", default=None, choices=KINDS, help="kind of OUT, where its ending "
                        "does not say")
    args = parser.parse_args(argv)
    print_lines(convert(args.source, args.target, args.to))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))

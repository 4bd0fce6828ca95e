"""Stands for `python3 -m ais_bench` and for `atc`; an "OM" is the ONNX file that it came from.

Of YOLACT++ it is the one beside that, which ONNX Runtime can run.
"""

from __future__ import annotations

import stat
import sys

AIS_BENCH = '''
import argparse, glob, os
import numpy as np, onnxruntime
parser = argparse.ArgumentParser()
for name in ("model", "input", "output", "outfmt", "batchsize", "device"):
    parser.add_argument("--" + name, required=True)
args = parser.parse_args()
assert args.outfmt == "BIN" and args.model.endswith(".om")
session = onnxruntime.InferenceSession(open(args.model, "rb").read(),
                                       providers=["CPUExecutionProvider"])
size = int(args.batchsize)
shape = session.get_inputs()[0].shape
assert shape[0] == size
files = sorted(glob.glob(os.path.join(args.input, "*.bin")))
folder = os.path.join(args.output, "2026_11_28-10_00_00")
os.makedirs(folder)
for start in range(0, len(files), size):
    part = files[start:start + size]
    images = np.zeros(shape, np.float32)
    for n, file in enumerate(part):
        images[n] = np.fromfile(file, np.float32).reshape(shape[1:])
    for number, output in enumerate(session.run(None, {"input.1": images})):
        for n, file in enumerate(part):
            stem = os.path.splitext(os.path.basename(file))[0]
            output[n].tofile(os.path.join(folder, "%s_%d.bin" % (stem, number)))
print("[INFO] -----------------Performance Summary------------------")
print("[INFO] throughput 1000*batchsize.mean(1)/NPU_compute_time.mean(1): 163.4")
'''
ATC = """#!{python}
import shutil, sys
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:])
shutil.copy(flags["model"].replace("_atc", ""), flags["output"] + ".om")
"""


def install(folder):
    """Write both below `folder`; returns the variables under which they are found."""
    package = folder / "python" / "ais_bench"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(AIS_BENCH)
    program = folder / "atc"
    program.write_text(ATC.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {"PYTHONPATH": str(folder / "python"), "PATH": str(folder)}

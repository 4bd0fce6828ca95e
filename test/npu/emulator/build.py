"""Build the libraries that stand in for CANN, so that the real torch_npu runs without a card.

    python test/npu/emulator/build.py [--output FOLDER] [--check]

Run it with the Python that has torch_npu; needs g++. Prints the folder to put on LD_LIBRARY_PATH.
Builds only when a source or the wheel changed. `--check` only says whether the folder is current.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Iterable, List, Optional, Sequence, Set

TORCH_NPU_VERSION = "2.13.0"  # the operators' signatures are those of this wheel
HERE = Path(__file__).resolve().parent
PACKAGES = Path(sysconfig.get_paths()["purelib"])
WHEEL = PACKAGES / "torch_npu"
TORCH = PACKAGES / "torch"
OPTIMISATION = "-O1"

CANN_SYMBOL = re.compile(r"(acl[A-Z]|aclrt|aclop|aclmdl|Hccl[A-Z]|rt[A-Z]|Msprof|_ZN3atb)")
# Called when torch_npu is loaded, to announce itself to a profiler that is not there.
SILENT = re.compile(r"Msprof|aclmdl")
# Libraries that torch_npu is linked to and that need to hold nothing.
EMPTY_LIBRARIES = ("libacl_op_compiler", "libge_runner", "libgraph", "libacl_tdt_channel")
# torch_npu takes the older entry point, with a public signature, where the newer one is missing.
LEFT_OUT = {"aclnnTopkV2"}


class BuildError(Exception):
    """The emulator cannot be built here; the text is for the user."""


def run(command: Sequence[object]) -> str:
    """Run a command and return what it printed; its errors go to stderr as they are."""
    words = [str(word) for word in command]
    try:
        return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    except FileNotFoundError:
        raise BuildError(f"{words[0]} was not found; install g++ and binutils") from None
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{words[0]} failed with exit code {error.returncode}") from None


def symbols(library: Path, which: str) -> Set[str]:
    """Dynamic symbols of a library: `which` is --defined-only or --undefined-only."""
    lines = run(["nm", "-D", which, library]).splitlines()
    return {line.split()[-1].split("@")[0] for line in lines if line.strip()}


def wheel_libraries() -> List[Path]:
    """The libraries of the torch_npu wheel."""
    return sorted(WHEEL.glob("lib/*.so")) + sorted(WHEEL.glob("_C*.so"))


def cann_symbols() -> Set[str]:
    """Symbols that torch_npu expects from CANN when it is loaded."""
    found: Set[str] = set()
    for library in wheel_libraries():
        found |= symbols(library, "--undefined-only")
    return {name for name in found if CANN_SYMBOL.match(name)}


def operator_names() -> Set[str]:
    """Ready-made operators (aclnnX) that torch_npu looks up by name when it calls them."""
    text = run(["strings", "-a", "-n", "6", WHEEL / "lib" / "libtorch_npu.so"])
    names = {name for name in text.splitlines() if re.fullmatch(r"aclnn[A-Za-z0-9_]+", name)}
    return {name for name in names if name + "GetWorkspaceSize" in names}


def stub(name: str, result: str) -> str:
    """A function `name` that does nothing but return `result`; the arguments are ignored."""
    visible = '__attribute__((visibility("default")))'
    return f'extern "C" {visible} int {name}() {{ return {result}; }}\n'


def stubs(names: Iterable[str]) -> str:
    """Stubs that report themselves as not emulated, save the silent ones."""
    text = 'extern "C" int npuemu_not_emulated(const char*);\n'
    for name in sorted(names):
        result = "0" if SILENT.match(name) else f'npuemu_not_emulated("{name}")'
        text += stub(name, result)
    return text


class Builder:
    """Compiles into one folder."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.temporary = output / "build"
        own = [HERE / "runtime", HERE / "operators"]
        others = [WHEEL / "include", WHEEL / "include/third_party/acl/inc",
                  WHEEL / "include/third_party/hccl/inc", TORCH / "include"]
        self.compile = ["g++", "-std=c++20", OPTIMISATION, "-g0", "-fPIC", "-shared", "-Wall",
                        "-Wextra", "-Wno-attributes", "-fvisibility=hidden",
                        *(f"-I{path}" for path in own),
                        *(f"-isystem{path}" for path in others)]

    def write(self, name: str, text: str) -> Path:
        """Write a generated source."""
        path = self.temporary / name
        path.write_text(text)
        return path

    def library(self, name: str, sources: Sequence[Path], *flags: str) -> Path:
        """Compile and link `sources` into <name>.so."""
        target = self.output / (name + ".so")
        run([*self.compile, *sources, f"-Wl,-soname,{name}.so", "-Wl,-rpath,$ORIGIN",
             f"-L{self.output}", *flags, "-o", target])
        return target

    def runtime(self) -> None:
        """Build libascendcl, libhccl and the libraries that only have to be there."""
        wanted = cann_symbols()
        sources = sorted((HERE / "runtime").glob("*.cpp"))
        own = symbols(self.library("libascendcl", sources), "--defined-only")
        mine = {name for name in wanted if not name.startswith(("Hccl", "_ZN3atb"))}
        self.library("libascendcl", [*sources, self.write("acl_stubs.cpp", stubs(mine - own))])
        runtime = ["-Wl,--no-as-needed", "-l:libascendcl.so"]

        source = HERE / "hccl" / "hccl.cpp"
        own = symbols(self.library("libhccl", [source], *runtime), "--defined-only")
        mine = {name for name in wanted if name.startswith("Hccl")}
        rest = self.write("hccl_stubs.cpp", stubs(mine - own))
        self.library("libhccl", [source, rest], *runtime)

        mine = {name for name in wanted if name.startswith("_ZN3atb")}
        self.library("libatb", [self.write("atb_stubs.cpp", stubs(mine))], *runtime)
        empty = self.write("empty.cpp", "")
        for name in EMPTY_LIBRARIES:
            self.library(name, [empty], *runtime)

    def operators(self) -> int:
        """Build libopapi; return the number of operators that it emulates."""
        # One translation unit: the headers of ATen cost more than everything written here.
        sources = sorted((HERE / "operators").glob("*.cpp"))
        unit = self.write("operators.cpp",
                          "".join(f'#include "{source}"\n' for source in sources))
        names = operator_names()
        flags = ["-L{}".format(TORCH / "lib"), "-Wl,-rpath,{}".format(TORCH / "lib"),
                 "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10", "-l:libascendcl.so"]
        have = symbols(self.library("libopapi_part", [unit], *flags), "--defined-only")
        text = stubs(set())
        for name in sorted(names - have - LEFT_OUT):
            refusal = f'npuemu_not_emulated("{name}")'
            text += stub(name, refusal) + stub(name + "GetWorkspaceSize", refusal)
        stub_file = self.write("operator_stubs.cpp", text)
        self.library("libopapi", [stub_file], "-O0", *flags, "-l:libopapi_part.so")
        return len(names & have)


def check_wheel() -> None:
    """Refuse any other torch_npu than the pinned one."""
    version_file = WHEEL / "version.py"
    if not version_file.is_file():
        raise BuildError(f"torch_npu is not installed for {sys.executable}; test/npu/make_env.sh "
                         "makes an environment that has it")
    found = re.search(r"__version__ = '([^']*)'", version_file.read_text())
    if found is None or found.group(1) != TORCH_NPU_VERSION:
        version = found.group(1) if found else "of unknown version"
        raise BuildError(f"torch_npu {version} is installed, the emulator knows the signatures of "
                         f"{TORCH_NPU_VERSION}"
                         )


def fingerprint() -> str:
    """Changes with any source, this file, the wheel or the Python."""
    digest = hashlib.sha256(str(WHEEL).encode())
    sources = sorted(path for path in HERE.rglob("*") if path.suffix in (".cpp", ".h"))
    for path in [*sources, Path(__file__), WHEEL / "version.py", TORCH / "version.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def build(output: Path) -> int:
    """Build everything into `output`; return the number of emulated operators."""
    builder = Builder(output)
    builder.temporary.mkdir(parents=True, exist_ok=True)
    builder.runtime()
    return builder.operators()


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Build where something changed; print the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(sys.prefix) / "npu_emulator",
                        help="folder of the libraries (default: npu_emulator in the environment)")
    parser.add_argument("--check", action="store_true", help="build nothing; exit 1 if outdated")
    options = parser.parse_args(argv)
    stamp = options.output / "stamp"
    try:
        check_wheel()
        wanted = fingerprint()
        current = stamp.is_file() and stamp.read_text() == wanted
        if options.check:
            return 0 if current else 1
        if not current:
            emulated = build(options.output)
            stamp.write_text(wanted)
            print(f"emulated operators: {emulated}", file=sys.stderr)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

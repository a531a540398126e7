"""Compiles the Triton kernels for a GPU that need not be there, and prints what each takes of it.

python scripts/dev/compile_kernels.py [--capability 90] [--output FILE]

JSON, by kernel and type, as stage 2 of the tiny model launches it: registers a thread, bytes spilled, bytes of shared
memory, and the instructions a thread executes once round the innermost loop.
"""

import argparse
import re
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from contextual_cnn.ops import sampled_conv_triton as kernels
from contextual_cnn.runs.environment import print_report

TYPES = {"bfloat16": "*bf16", "float32": "*fp32"}
POINTERS = {"gy", "x", "y", "gx"}  # in the model's type; all others are float32
BLOCKS = kernels.BLOCKS
KERNELS = {  # the constants that differ, and the warps
    "_forward_kernel": ({"BLOCK_P": BLOCKS.positions}, BLOCKS.warps),
    "_weight_offset_kernel": ({"BLOCK_P": BLOCKS.positions}, BLOCKS.warps),
    "_input_kernel": ({"BLOCK_Q": BLOCKS.pixels, "BLOCK_P": BLOCKS.points}, BLOCKS.hat_warps),
}
NUMBERS = dict(H=28, W=28, C=192, P=784, B=128, out_width=28, stride=1, padding=3, dilation=1) | {
    "spans": triton.cdiv(784, BLOCKS.points)
}  # the integers at stage 2; at stages 3 and 4 the figures differ by less than 5 %
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"  # NVIDIA's, that come with Triton


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    report = {
        "triton": version("triton"),
        "target": f"sm_{arguments.capability}",
        "kernels": [
            {"kernel": name.strip("_"), "type": type_name, **compile_kernel(name, type_name, arguments.capability)}
            for name in KERNELS
            for type_name in TYPES
        ],
    }
    print_report(report, arguments.output)


def compile_kernel(name: str, type_name: str, capability: int) -> dict:
    """One kernel as the model calls it: 7x7 taps, offsets, no mask."""
    function = getattr(kernels, name)
    blocks, warps = KERNELS[name]
    chunks = 1 if name == "_input_kernel" and type_name == "float32" else BLOCKS.chunks
    constants = {"K": 49, "KW": 7, "CHUNKS": chunks, "WHOLE": True, "BLOCK_C": BLOCKS.channels, **blocks}
    source = specialised(function, constants | {"mask": None, "gmask": None}, TYPES[type_name])
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    return {**assembler_report(compiled.asm["ptx"], capability), "shared": compiled.metadata.shared}


def specialised(function: triton.JITFunction, constants: dict, type_name: str) -> ASTSource:
    """With what Triton's launcher tells the compiler of the arguments: which are 1, and which multiples of 16 are."""
    ones = {argument: 1 for argument, number in NUMBERS.items() if number == 1}
    constants = {argument: value for argument, value in (constants | ones).items() if argument in function.arg_names}
    signature, multiples = {}, []
    for argument in function.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        pointer = type_name if argument in POINTERS else "*fp32"
        signature[argument] = "i32" if argument in NUMBERS else pointer
        if NUMBERS.get(argument, 0) % 16 == 0:  # every tensor begins at one
            multiples.append(argument)
    position = {argument: (i,) for i, argument in enumerate(function.arg_names)}
    return ASTSource(
        fn=function,
        signature=signature,
        constexprs={position[argument]: value for argument, value in constants.items()},
        attrs={position[argument]: [["tt.divisibility", 16]] for argument in multiples},
    )


def assembler_report(ptx: str, capability: int) -> dict:
    """What NVIDIA's assembler makes of a kernel."""
    suffix = "a" if capability >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        said = run(TOOLS / "ptxas", "-v", f"--gpu-name=sm_{capability}{suffix}", source, "-o", binary).stderr
        listing = run(TOOLS / "cuobjdump", "-sass", binary).stdout
    stores, loads = (int(re.search(rf"(\d+) bytes spill {what}", said)[1]) for what in ("stores", "loads"))
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spilled": stores + loads,
        "loop_instructions": innermost_loop(listing),
    }


def innermost_loop(listing: str) -> int:
    """Instructions from the target of a backward branch to the branch, of the shortest such loop."""
    found = re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", listing)
    instructions = [(int(match[1], 16), match[2]) for match in found]
    spans = []
    for address, text in instructions:
        branch = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:  # a branch to itself is the padding behind the end
            spans.append(sum(int(branch[1], 16) <= at <= address for at, _ in instructions))
    return min(spans)


def run(*command: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=True)


if __name__ == "__main__":
    main()

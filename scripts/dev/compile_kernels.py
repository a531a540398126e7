"""Compiles the Triton kernels for a GPU that need not be there, and prints what each takes of it.

python scripts/dev/compile_kernels.py [--capability 90] [--output FILE]

JSON, by kernel and type, as stage 2 of the tiny model launches it: registers a thread, bytes spilled, bytes of shared
memory, and the instructions a thread executes once round the innermost loop. Triton's interpreter takes more than its
compiler does, so what runs in the one may still not compile.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from contextual_cnn.ops import depthwise_conv_triton as depthwise
from contextual_cnn.ops import sampled_conv_triton as sampled
from contextual_cnn.runs.environment import print_report

# Stage 2 of the tiny model at 128 images; at stages 3 and 4 the figures differ by less than 5 %
NUMBERS = dict(
    H=28, W=28, C=192, P=784, B=128, out_width=28, stride=1, padding=3, dilation=1,
    length=800, spans=25, HO=28, WO=28, pad_rows=3, pad_columns=3, blocks=448, blocks_each=3,
)  # fmt: skip
OFFSET_MAPS = {**NUMBERS, "C": 98}  # of the layer that makes its sampling offsets
MAPS = {"gy", "x", "y", "gx"}  # in the model's type; what is not named here is float32
LISTS = {"visits": "*i32", "counts": "*i32"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"  # NVIDIA's, that come with Triton


class Launch(NamedTuple):
    """One kernel as a layer launches it."""

    module: str
    function: triton.JITFunction
    type: str
    constants: dict[str, Any]
    options: dict[str, int]
    numbers: dict[str, int] = NUMBERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    report = {
        "triton": version("triton"),
        "target": f"sm_{arguments.capability}",
        "kernels": [
            {
                "module": launch.module,
                "kernel": launch.function.__name__.strip("_"),
                "type": launch.type,
                **compile_kernel(launch, arguments.capability),
            }
            for launch in (*sampled_launches(), *depthwise_launches())
        ],
    }
    print_report(report, arguments.output)


def sampled_launches() -> Iterator[Launch]:
    """7x7 taps, offsets, no mask."""
    absent = dict(mask=None, amounts=None, gmask=None)
    taps = dict(K=49, KW=7, BLOCK_K=64)
    lists = dict(BLOCK_Q=sampled.INPUT.pixels, BLOCK_E=2048)
    yield launch(sampled, "_arrange_kernel", "fp32", taps | absent | dict(BLOCK_P=sampled.INPUT.points), num_warps=8)
    yield launch(sampled, "_visit_kernel", "fp32", taps | lists)
    for name, low, exact in (
        ("_forward_kernel", sampled.FORWARD, sampled.FORWARD),
        ("_weight_offset_kernel", sampled.WEIGHT_OFFSET, sampled.WEIGHT_OFFSET_EXACT),
        ("_input_kernel", sampled.INPUT, sampled.INPUT_EXACT),
    ):
        for type_name, block in (("bf16", low), ("fp32", exact)):
            hats = name == "_input_kernel"
            constants = taps | absent | dict(WHOLE=True, CHUNKS=block.chunks)
            constants |= dict(BLOCK_C=block.channels, BLOCK_Q=block.pixels)
            constants["BLOCK_P"] = block.points if hats else block.positions
            options = dict(num_stages=block.stages) if hats else {}
            yield launch(sampled, name, type_name, constants, num_warps=block.warps, **options)


def depthwise_launches() -> Iterator[Launch]:
    """A plain layer in bfloat16, and the offset generator's in float32."""
    taps = dict(KH=7, KW=7, FLIP=False, bias=None)
    for name, plain in (("_forward_kernel", depthwise.FORWARD_4), ("_weight_kernel", depthwise.WEIGHT)):
        for type_name, numbers in (("bf16", NUMBERS), ("fp32", OFFSET_MAPS)):
            block = depthwise.FORWARD if type_name == "fp32" and name == "_forward_kernel" else plain
            constants = taps | dict(ROWS=block.rows, BLOCK_Q=block.columns, BLOCK_C=block.channels)
            constants["WHOLE"] = numbers["C"] % block.channels == 0
            yield launch(depthwise, name, type_name, constants, num_warps=block.warps)._replace(numbers=numbers)


def launch(module: Any, name: str, type_name: str, constants: dict, **options: int) -> Launch:
    function = getattr(module, name)
    constants = {argument: value for argument, value in constants.items() if argument in function.arg_names}
    return Launch(module.__name__.rpartition(".")[2], function, type_name, constants, options)


def compile_kernel(launch: Launch, capability: int) -> dict:
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(specialised(launch), target=target, options=launch.options)
    return {**assembler_report(compiled.asm["ptx"], capability), "shared": compiled.metadata.shared}


def specialised(launch: Launch) -> ASTSource:
    """With what Triton's launcher tells the compiler of the arguments: which are 1, and which multiples of 16 are."""
    function, numbers = launch.function, launch.numbers
    ones = {argument: 1 for argument in function.arg_names if numbers.get(argument) == 1}
    constants = launch.constants | ones
    signature, multiples = {}, []
    for argument in function.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        pointer = f"*{launch.type}" if argument in MAPS else LISTS.get(argument, "*fp32")
        signature[argument] = "i32" if argument in numbers else pointer
        if numbers.get(argument, 0) % 16 == 0:  # every tensor begins at one
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


def innermost_loop(listing: str) -> int | None:
    """Instructions from the target of a backward branch to the branch, of the shortest such loop; None without one."""
    found = re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", listing)
    instructions = [(int(match[1], 16), match[2]) for match in found]
    spans = []
    for address, text in instructions:
        branch = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:  # a branch to itself is the padding behind the end
            spans.append(sum(int(branch[1], 16) <= at <= address for at, _ in instructions))
    return min(spans, default=None)


def run(*command: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=True)


if __name__ == "__main__":
    main()

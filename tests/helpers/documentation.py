"""What the documentation names, taken from its text: commands, code blocks, tests."""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_INLINE = re.compile(r"`((?:python|torchrun|sbatch|pip|\./scripts/|wandb) ?[^`]*)`")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Of the bash blocks, a line each (continued ones put together, comments left out), then those within the text.

    In a block that is a transcript, with prompts, they are the lines after a $.
    """
    found = []
    for block in blocks(page, "bash") + blocks(page, "console"):
        lines = block.replace("\\\n", " ").splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        found += [re.sub(r"(^|\s)#.*", "", line) for line in lines]
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found += [command for command in _INLINE.findall(text) if " " in command or command.endswith(".sh")]
    return [re.sub(r"\s+", " ", command).strip() for command in found if command.strip()]


@functools.cache
def _tests(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def is_test(name: str) -> bool:
    """Whether `tests/FILE.py::test_function` exists."""
    path, _, function = name.partition("::")
    return (ROOT / path).is_file() and function.startswith("test_") and function in _tests(path)

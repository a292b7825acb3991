"""What is imported costs every command and every rank: torch and its compiler come where they are used."""

import ast
import re
import subprocess
import sys

from tests.test_floors import FILES, HOME, name, within


def test_config_classes_come_without_torch() -> None:
    """A mistake is told before seconds of importing: no class that conf/ names brings torch along."""
    found = {
        target for file in HOME.glob("conf/**/*.yaml") for target in re.findall(r"_target_: (\S+)", file.read_text())
    }
    modules = sorted({target.rpartition(".")[0] for target in found})
    assert "src.models.llama3.config" in modules
    script = (
        "import importlib, sys\n"
        "for module in sys.argv[1:]:\n"
        "    importlib.import_module(module)\n"
        "    assert 'torch' not in sys.modules, module\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *modules], cwd=HOME, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_the_compiler_is_imported_where_it_is_used() -> None:
    """At the head of a file it would cost every rank seconds before it reads its config."""
    heads = [(file, node) for file in FILES for node in ast.parse(file.read_text()).body]
    imported = [
        (name(file), each)
        for file, node in heads
        if isinstance(node, ast.Import | ast.ImportFrom)
        for each in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names])
    ]
    assert ("src.models.attention.cores", "torch.nn.attention.flex_attention") in imported
    slow = ("torch._dynamo", "torch._inductor", "torch.distributed.pipelining")
    assert [f"{file} {each}" for file, each in imported if within(each, slow)] == []

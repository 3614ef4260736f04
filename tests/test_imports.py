"""Who may import whom, who may name a vendor, and how long a file may be: the plan in DESIGN.md, kept by its syntax trees."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import octavo

ROOT = Path(octavo.__file__).parent
FILES = {
    ".".join(("octavo", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}

# Who may import whom: a part, and the parts right below it; what those may import, it may too. The API side (server, frontend,
# text) reaches the engine by one listed lazy import alone.
BELOW = {
    "cli": {"tools", "server"},
    "tools": {"server", "frontend", "engine", "convert"},
    "server": {"frontend"},
    "frontend": {"text", "messages"},
    "engine": {"convert", "models", "text", "messages"},
    "convert": {"models"},
    "models": {"layers"},
    "layers": {"weights"},
    "weights": {"ops"},
    "ops": {"kvcache"},
    "kvcache": {"quant"},
    "quant": {"platform", "distributed"},
    "platform": {"host"},
    "text": {"messages"},
    "messages": set(),
    "distributed": set(),
    "host": set(),
}
FOR_ALL = {"errors", "batch", "demo", "version"}  # leaves
LAZY = {("octavo.frontend.engine_start", "octavo.engine.worker")}  # what starts an engine; its worker imports no torch
CONFIG_READERS = {"cli", "server", "frontend", "engine", "tools"}
VENDORS = {"octavo.platform", "octavo.ops.cuda", "octavo.ops.rocm", "octavo.ops.triton.launch", "octavo.ops.hopper.compile"}
CATALOGUES = {"octavo.tools.plan.accelerators"}  # names of products are the data there
VENDOR = re.compile(r"cuda|hip(?![a-z])|nvidia|(?<![a-z])amd|rocm", re.IGNORECASE)


def imports(tree: ast.AST, module: str) -> Iterator[str]:
    """The modules of octavo that a file imports, at its top or within a function, but not for types alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "octavo")
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative imports hide who is imported"
            if (node.module or "").split(".")[0] == "octavo":
                base = node.module or ""
                yield from (f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base for alias in node.names)
        else:
            yield from imports(node, module)


def part_of(module: str) -> str:
    """octavo.ops.cpu.linear -> ops; the package itself -> octavo."""
    return module.split(".")[1] if "." in module else "octavo"


def below(part: str) -> set[str]:
    """All parts under `part`."""
    return BELOW[part].union(*map(below, BELOW[part]))


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down(module: str) -> None:
    own = part_of(module)
    for target in imports(ast.parse(FILES[module].read_text()), module):
        other = part_of(target)
        if other == own or other in FOR_ALL or target == "octavo":
            assert own not in FOR_ALL or other == own, f"{module} is for all and imports {target}"
        elif other == "config":
            assert own in CONFIG_READERS | {"octavo"}, f"{module} imports {target}: it gets plain values"
        elif own != "octavo" and (module, target) not in LAZY:  # the package itself offers the public names
            assert own in BELOW, f"{module} imports {target}, but has no place in the order"
            assert other in below(own), f"{module} imports {target}, which is above it or beside it"


def words(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names, attributes and strings of the code; its documentation may name anything."""
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.alias(name=word) | ast.arg(arg=word):
                yield node.lineno, word
            case ast.Constant(value=str(word)) if id(node) not in documentation:
                yield node.lineno, word


@pytest.mark.parametrize("module", sorted(set(FILES) - VENDORS - CATALOGUES))
def test_only_the_platform_names_vendors(module: str) -> None:
    # Reading which device a person asked for, and binding ops.cuda, are choices by Platform's word.
    allowed = {
        "octavo.config": {"cuda", "auto, cuda or cpu"},
        "octavo.ops": {"cuda", "rocm", "octavo.ops.cuda", "octavo.ops.rocm"},
    }.get(module, set())
    found = [(line, word) for line, word in words(ast.parse(FILES[module].read_text())) if VENDOR.search(word)]
    assert [(line, word) for line, word in found if word not in allowed] == []


@pytest.mark.parametrize("module", FILES)
def test_files_stay_short(module: str) -> None:
    limit = 500 if part_of(module) == "ops" else 300
    assert len(FILES[module].read_text().splitlines()) <= limit


@pytest.mark.parametrize(
    "module", ["octavo", "octavo.cli", "octavo.config", "octavo.frontend.async_engine", "octavo.server.app"]
)
def test_the_api_process_never_imports_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]"

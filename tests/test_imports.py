"""The layout, kept by the syntax trees: who may import whom, no circles, who may name a vendor, names and lengths of files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import octavo

ROOT = Path(octavo.__file__).parent
FILES = {
    ".".join(("octavo", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


@cache
def trees() -> dict[str, ast.Module]:
    """Read when the first test asks: every process of pytest imports this file."""
    return {module: ast.parse(path.read_text()) for module, path in FILES.items()}


# Who may import whom: a part, and the parts right below it; what those may import, it may too. The API side (server, frontend,
# text, vision) reaches the engine by one listed lazy import alone.
BELOW = {
    "__main__": {"cli"},
    "ray_serve": {"flags", "command_words", "server"},
    "cli": {"flags", "command_words", "tools", "server"},
    "command_words": {"flags"},
    "flags": {"checkpoint_values", "peer_flags", "hub"},
    "checkpoint_values": {"option_values", "hub"},
    "hub": {"files"},
    "tools": {"server", "frontend", "engine", "convert"},
    "server": {"frontend", "host"},
    "frontend": {"text", "vision", "messages", "hub", "peer_flags", "checkpoint_values"},
    "engine": {"convert", "models", "text", "messages"},
    "convert": {"models"},
    "models": {"layers"},
    "layers": {"weights"},
    "weights": {"ops"},
    "ops": {"kvcache"},
    "kvcache": {"quant"},
    "quant": {"platform", "distributed"},
    "platform": {"host", "files"},
    "text": {"messages", "files"},
    "vision": {"messages", "files"},
    "messages": {"pipes", "token_logprobs"},
    "pipes": set(),
    "token_logprobs": set(),
    "distributed": {"stages"},
    "stages": set(),
    "host": set(),
    "config": {"quantization_file", "option_types", "option_checks"},
    "option_checks": {"option_values"},
    "option_types": set(),
    "quantization_file": {"option_values"},
    "option_values": set(),
    "peer_flags": set(),
    "files": set(),
}
FOR_ALL = {"errors", "batch", "demo", "images", "version"}  # leaves
# Lazy imports that go up, or close a circle of folders -> why each must be.
LAZY = {
    ("octavo.frontend.engine_start", "octavo.engine.worker"): "what starts an engine; its worker imports no torch",
}
# Circles that stand.
CIRCLES: set[frozenset[str]] = set()
CONFIG_READERS = {"flags", "server", "frontend", "engine", "tools"}
VENDORS = {
    "octavo.host",
    "octavo.platform",
    "octavo.ops.cuda",
    "octavo.ops.rocm",
    "octavo.ops.triton.launch",
    "octavo.ops.hopper.compile",
}
CATALOGUES = {"octavo.tools.plan.accelerators", "octavo.peer_flags"}  # names of products are the data there
VENDOR = re.compile(r"cuda|hip(?![a-z])|nvidia|(?<![a-z])amd|rocm", re.IGNORECASE)
# A name may recur for a layer and its op, and for an op on its back ends.
LAYERS_AND_OPS = {"layers", "ops", "ops/cpu", "ops/hopper", "ops/triton"}
# Files whose names recur all the same -> why.
RECURRING = {
    "models/config.py": "of a checkpoint, where config.py is of an engine",
    "engine/graphs/decode.py": "the steps whose graphs it keeps are named so, as their kernels are",
    "engine/graphs/prefill.py": "the steps whose graphs it keeps are named so, as their kernels are",
}
API_SIDE = re.compile(
    r"octavo(\.cli|\.flags|\.config|\.files|\.images|\.option_values|\.peer_flags|\.command_words|\.checkpoint_values"
    r"|\.quantization_file|\.option_types|\.option_checks|\.host|\.messages|\.pipes|\.(text|vision|hub|frontend|server)(\..*)?)?"
)


class Import(NamedTuple):
    """One module of octavo that a file imports: within a function, or for types alone, or neither."""

    target: str
    lazy: bool
    for_types: bool


def imports(node: ast.AST, lazy: bool = False, for_types: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            base = "." * child.level + (child.module or "")
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base for alias in child.names]
        else:
            within = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            typed = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from imports(child, lazy or within, for_types or typed)
            continue
        yield from (Import(name, lazy, for_types) for name in names if name.split(".")[0] in ("octavo", ""))


@cache
def all_imports() -> dict[str, list[Import]]:
    return {module: list(imports(tree)) for module, tree in trees().items()}


def none(found: Iterable[object]) -> None:
    """Fails with all that was found, a line each: pytest's own comparison shows the first."""
    lines = sorted(map(str, found))
    assert not lines, "\n" + "\n".join(lines)


def part_of(module: str) -> str:
    """octavo.ops.cpu.linear -> ops; the package itself -> octavo."""
    return module.split(".")[1] if "." in module else "octavo"


def below(part: str) -> set[str]:
    """All parts under `part`."""
    return BELOW[part].union(*map(below, BELOW[part]))


def wrong_direction(module: str, target: str) -> str | None:
    own, other = part_of(module), part_of(target)
    if target.startswith("."):
        return "a relative import hides who is imported"
    if other == own or other in FOR_ALL or target == "octavo":
        return "it is for all and imports nothing" if own in FOR_ALL and other != own else None
    if other == "config":
        return None if own in CONFIG_READERS | {"octavo"} else "it gets plain values"
    if own == "octavo" or (module, target) in LAZY:  # the package itself offers the public names
        return None
    if own not in BELOW:
        return "it has no place in the order"
    return None if other in below(own) else "that is above it or beside it"


def test_imports_go_down() -> None:
    found = [(module, one.target, why) for module, all_of_it in all_imports().items() for one in all_of_it
             if not one.for_types and (why := wrong_direction(module, one.target))]  # fmt: skip
    none(found)


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """The largest sets of nodes of which each reaches each."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, waiting = set[str](), list(graph[start])
        while waiting:
            if (node := waiting.pop()) not in seen:
                seen.add(node)
                waiting += graph.get(node, ())
        reached[start] = seen
    return {frozenset(b for b in seen if a in reached.get(b, ())) for a, seen in reached.items() if a in seen}


def test_no_module_is_in_a_circle() -> None:
    """Within a folder neither, and not for types alone."""
    found = circles({module: {one.target for one in all_of_it if not one.lazy} for module, all_of_it in all_imports().items()})
    none(map(sorted, found - CIRCLES))
    assert found >= CIRCLES, "a circle that is gone is still listed"


def test_no_folder_is_in_a_circle() -> None:
    """Lazy imports count, unless they are listed with their reason."""
    graph = defaultdict[str, set[str]](set)
    for module, all_of_it in all_imports().items():
        for one in all_of_it:
            own, other = part_of(module), part_of(one.target)
            if "octavo" not in (own, other) and own != other and not (one.lazy and (module, one.target) in LAZY):
                graph[own].add(other)
    none(map(sorted, circles(graph)))
    made = {(module, one.target) for module, all_of_it in all_imports().items() for one in all_of_it if one.lazy}
    assert set(LAZY) <= made, "a lazy import that is gone is still listed"


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


def test_only_the_platform_names_vendors() -> None:
    # Reading which device a person asked for, and binding ops.cuda, are choices by Platform's word.
    allowed = {
        "octavo.config": {"cuda"},
        "octavo.ops": {"cuda", "rocm", "octavo.ops.cuda", "octavo.ops.rocm"},
    }
    found = [
        (module, line, word)
        for module in sorted(set(FILES) - VENDORS - CATALOGUES)
        for line, word in words(trees()[module])
        if VENDOR.search(word) and word not in allowed.get(module, ())
    ]
    none(found)


def test_files_stay_short() -> None:
    lengths = {module: len(path.read_text().splitlines()) for module, path in FILES.items()}
    none((module, n) for module, n in lengths.items() if n > (500 if part_of(module) == "ops" else 300))


def recurring(paths: Iterable[str]) -> list[list[str]]:
    """Files of one name that are neither a layer and its op nor one op on several back ends."""
    named = defaultdict[str, list[str]](list)
    for path in paths:
        if not path.endswith("__init__.py") and path not in RECURRING:
            named[Path(path).name].append(path)
    return [same for same in named.values() if len(same) > 1 and {str(Path(path).parent) for path in same} - LAYERS_AND_OPS]


def test_a_name_of_a_file_recurs_only_for_a_layer_and_its_op() -> None:
    paths = [str(path.relative_to(ROOT)) for path in FILES.values()]
    none(recurring(paths))
    assert set(RECURRING) <= set(paths)
    assert recurring(["layers/a.py", "ops/cpu/a.py", "ops/hopper/a.py", "x/b.py", "ops/b.py"]) == [["x/b.py", "ops/b.py"]]


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"d", "gone"}}) == {frozenset("abc"), frozenset("d")}


TORCHLESS = """
import importlib, sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers"):
            print(module, "imports", name)
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refused())
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        pass
print("imported", len(set(sys.argv[1:]) & set(sys.modules)))
"""


def test_the_api_process_never_imports_torch() -> None:
    modules = [module for module in FILES if API_SIDE.fullmatch(module)]
    assert {"octavo", "octavo.cli", "octavo.config", "octavo.frontend.async_engine", "octavo.server.app"} < set(modules)
    command = [sys.executable, "-c", TORCHLESS, *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.parent)
    *found, last = done.stdout.splitlines()
    none(found)
    assert last == f"imported {len(modules)}"

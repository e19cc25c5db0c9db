"""The rules of the architecture as plain functions: a root folder in, a list of violations out.

`tests/test_architecture.py` runs them on this project and on small broken trees. Each violation is one line that names
the file, what was found and what is allowed. Files are parsed, never imported, so imports inside functions and under
TYPE_CHECKING count as well.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

PACKAGE = "megatron_rl"

# Room -> level. An import may only go to a lower level or stay inside its own room.
LEVELS = {
    **dict.fromkeys(("config", "devices", "registry", "log"), 0),
    **dict.fromkeys(("ops", "batch", "tracking"), 1),
    **dict.fromkeys(("collectives", "parallel"), 2),
    **dict.fromkeys(("reshard", "dataflow"), 3),
    **dict.fromkeys(("models", "data", "rewards"), 4),
    **dict.fromkeys(("weights", "rollout", "environments"), 5),
    "engines": 6,
    "workers": 7,
    "algorithms": 8,
    "trainer": 9,
    "run": 10,
    "cli": 11,
    "__main__": 12,
    "__init__": 12,  # the package's face: lazy names for everything public
}

# Third party (dotted prefix) -> rooms, folders and modules that may import it.
THIRD_PARTY_ROOMS = {
    # The modules of models translate the fields of Megatron's TransformerConfig.
    "megatron": {
        "devices",
        "parallel",
        "collectives",
        "engines/megatron",
        "models/job_arguments",
        "models/latent_fields",
        "models/megatron_architecture",
    },
    "megatron_rl.engines.megatron": {"engines"},
    "sglang": {"rollout", "weights"},
    "mlflow": {"tracking"},
    "tensorboard": {"tracking"},
    "torch.utils.tensorboard": {"tracking"},
    "wandb": {"tracking"},
    "megatron_rl.engines.fsdp2": {"engines"},
    "transformers": {"models", "weights", "engines/fsdp2"},
    "safetensors": {"models", "weights"},
    "triton": {"ops"},
}

# Where CUDA and the names of communication backends may be spelled out; a trailing * is a file-name prefix.
HARDWARE_ROOMS = ("devices/*", "collectives/*", "reshard/transport*", "ops/*", "rollout/*")

BACKEND_LITERAL = re.compile(r"((cpu|cuda):)?(nccl|gloo)(,((cpu|cuda):)?(nccl|gloo))*")
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
PRINTING_ROOMS = {"cli"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MEDIAN_FILE_LINES = range(40, 201)
MAX_EXAMPLE_LINES = 60
LONG_EXAMPLES = {"arithmetic_grpo/pretrain.py"}  # stands for the job that a user already has
SOURCE_SUFFIXES = {".py", ".cpp", ".cu", ".cuh", ".h", ".hpp"}


def modules(root: Path) -> list[Path]:
    """Every Python file of the package, sorted."""
    return sorted((root / PACKAGE).rglob("*.py"))


def room_of(root: Path, path: Path) -> str:
    """The first name below the package: "reshard" for megatron_rl/reshard/plan.py, "log" for megatron_rl/log.py."""
    first = path.relative_to(root / PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_names(root: Path, path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything the file imports, wherever the statement stands."""
    package = path.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def layer_violations(root: Path) -> list[str]:
    """Imports that go up, or sideways into another room of the same level."""
    found = []
    for path in modules(root):
        room = room_of(root, path)
        place = path.relative_to(root)
        if room not in LEVELS:
            found.append(f"{place}: room {room!r} has no level; rooms are {', '.join(LEVELS)}")
            continue
        for line, name in imported_names(root, path):
            parts = name.split(".")
            if parts[0] != PACKAGE or len(parts) < 2 or parts[1] in (room, "__version__"):
                continue
            target = parts[1]
            if target not in LEVELS:
                found.append(f"{place}:{line}: {name} comes from the package's face: import it from its room")
            elif LEVELS[target] >= LEVELS[room]:
                way = "up" if LEVELS[target] > LEVELS[room] else "sideways"
                found.append(
                    f"{place}:{line}: {room} (level {LEVELS[room]}) imports {way} "
                    f"from {target} (level {LEVELS[target]})"
                )
    return found


def third_party_violations(root: Path) -> list[str]:
    """Third parties imported outside the rooms that own them."""
    found = []
    for path in modules(root):
        place = path.relative_to(root / PACKAGE).with_suffix("").as_posix() + "/"
        for line, name in imported_names(root, path):
            for prefix, rooms in THIRD_PARTY_ROOMS.items():
                inside = place.startswith(tuple(f"{room}/" for room in rooms))
                if (name == prefix or name.startswith(prefix + ".")) and not inside:
                    found.append(
                        f"{path.relative_to(root)}:{line}: {name} is imported only in {', '.join(sorted(rooms))}"
                    )
    return found


def import_graph(root: Path) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, wherever the statement stands.

    A name that a package's ``__init__`` re-exports (``from megatron_rl.models import family_of``) counts as an import
    of the ``__init__``. So does a module of a package that the importer stands outside of: Python runs the ``__init__``
    first, and with it everything that it re-exports. For a neighbour in the same package it has run already.
    """
    named = {dotted_name(root, path): path for path in modules(root)}
    graph: dict[str, set[str]] = {name: set() for name in named}
    for name, path in named.items():
        for _, imported in imported_names(root, path):
            target = imported if imported in named else imported.rpartition(".")[0]
            parts = target.split(".")
            around = {".".join(parts[:depth]) for depth in range(1, len(parts))}
            graph[name] |= {package for package in around if not f"{name}.".startswith(f"{package}.")} | {target}
        graph[name] = (graph[name] & named.keys()) - {name}
    return graph


def dotted_name(root: Path, path: Path) -> str:
    """megatron_rl.reshard.plan for megatron_rl/reshard/plan.py, megatron_rl.reshard for its ``__init__``."""
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def cycle_violations(root: Path) -> list[str]:
    """Modules that import one another, also where an import stands inside a function or under TYPE_CHECKING."""
    graph, found = import_graph(root), []
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append(" -> ".join([*path[path.index(name) :], name]) + ": modules import one another")
        elif name not in done:
            for target in sorted(graph[name]):
                visit(target, [*path, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


def hardware_violations(root: Path) -> list[str]:
    """`torch.cuda`, "nccl" and "gloo" outside the rooms that know the hardware."""
    found = []
    for path in modules(root):
        inside = path.relative_to(root / PACKAGE).as_posix()
        if any(inside.startswith(room.removesuffix("*")) for room in HARDWARE_ROOMS):
            continue
        hits = [(line, name) for line, name in imported_names(root, path) if name.startswith("torch.cuda")]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda":
                hits.append((node.lineno, "torch.cuda"))
            elif isinstance(node, ast.Constant) and BACKEND_LITERAL.fullmatch(str(node.value)):
                hits.append((node.lineno, repr(node.value)))
        where = ", ".join(HARDWARE_ROOMS)
        found += [f"{path.relative_to(root)}:{line}: {what} stands only in {where}" for line, what in hits]
    return found


def source_files(root: Path) -> list[Path]:
    """Hand-written sources: the package, tests, tools, examples, csrc and setup.py."""
    folders = (PACKAGE, "tests", "tools", "examples", "csrc")
    files = [p for folder in folders for p in (root / folder).rglob("*") if p.suffix in SOURCE_SUFFIXES]
    return sorted(files + list(root.glob("*.py")))


def count_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def file_size_violations(root: Path) -> list[str]:
    """Files above the limit, and a package whose median file is out of proportion."""
    sizes = {path: len(path.read_text().splitlines()) for path in source_files(root)}
    found = [
        f"{p.relative_to(root)}: {n} lines, at most {MAX_FILE_LINES}" for p, n in sizes.items() if n > MAX_FILE_LINES
    ]
    package = [len(p.read_text().splitlines()) for p in modules(root) if p.name != "__init__.py"]
    if len(package) >= 10 and round(median(package)) not in MEDIAN_FILE_LINES:
        found.append(f"{PACKAGE}: the median file has {median(package)} lines, expected 40-200")
    return found


def function_size_violations(root: Path) -> list[str]:
    """Functions longer than the limit, docstring included."""
    found = []
    for path in source_files(root):
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    found.append(
                        f"{path.relative_to(root)}:{node.lineno}: {node.name} has {lines} lines, "
                        f"at most {MAX_FUNCTION_LINES}"
                    )
    return found


def name_violations(root: Path) -> list[str]:
    """Modules and folders with a standard-library name or a name that says nothing."""
    found = []
    for path in (root / PACKAGE).rglob("*"):
        if not (path.is_dir() or path.suffix == ".py") or path.name == "__pycache__":
            continue
        name = path.name.removesuffix(".py")
        if name in sys.stdlib_module_names:
            found.append(f"{path.relative_to(root)}: {name} is the name of a standard-library module")
        if name in VAGUE_NAMES:
            found.append(f"{path.relative_to(root)}: {name} does not say what is inside")
    return found


def docstring_violations(root: Path) -> list[str]:
    """Modules that do not begin by saying what they are."""
    return [
        f"{path.relative_to(root)}: no module docstring"
        for path in modules(root)
        if ast.get_docstring(ast.parse(path.read_text())) is None
    ]


def print_violations(root: Path) -> list[str]:
    """`print` in the package: rank 0 logs; only the command line speaks."""
    return [
        f"{path.relative_to(root)}:{node.lineno}: print(); use logging.getLogger(__name__)"
        for path in modules(root)
        if room_of(root, path) not in PRINTING_ROOMS
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def example_violations(root: Path) -> list[str]:
    """Example programs longer than a newcomer reads at once."""
    examples = root / "examples"
    sizes = {
        path.relative_to(examples).as_posix(): len(path.read_text().splitlines()) for path in examples.rglob("*.py")
    }
    return [
        f"examples/{name}: {size} lines, at most {MAX_EXAMPLE_LINES}"
        for name, size in sorted(sizes.items())
        if size > MAX_EXAMPLE_LINES and name not in LONG_EXAMPLES
    ]


RULES = {
    "layers": layer_violations,
    "third parties": third_party_violations,
    "cycles": cycle_violations,
    "hardware": hardware_violations,
    "file size": file_size_violations,
    "function size": function_size_violations,
    "names": name_violations,
    "docstrings": docstring_violations,
    "prints": print_violations,
    "examples": example_violations,
}

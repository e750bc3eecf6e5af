"""The rules of the house as functions of source text, so that each can be shown to catch a planted fault."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

FLOORS = {
    "cli": 10,
    "lab": 9,
    "systems": 8,
    "build": 6,
    "compress": 6,
    "parallel": 6,
    "run": 6,
    "plan": 5,
    "train": 5,
    "measure": 4,
    "profile": 4,
    "nn": 3,
    "recipes": 0,
    "stream": 3,
    "checkpoint": 2.2,
    "blocks": 2.1,
    "kernels": 2.0,
    "algebra": 2.0,
    "formats": 1,
    "contract": 0,
    "bank": 0,
    "errors": 0,
    "_imports": 0,
}
ALLOWED = {("bank", "contract"), ("bank", "errors"), ("contract", "errors")}
FAMILIES = re.compile(
    r"qwen|mixtral|deepseek|olmoe|llama|gpt_?oss|glm4|dbrx|jetmoe|phimoe|ernie|granite|minimax|longcat|nllb"
    r"|switch_?transformers|jamba|hunyuan|flex_?olmo|bailing|dots1|nemotron|exaone|lfm2",
    re.IGNORECASE,
)
FAMILY_ROOMS = {"blocks", "checkpoint"}
MAX_FILE, MEDIAN_FILE, MAX_FUNCTION = 300, 120, 50
FORBIDDEN_CALLS = {"eval", "exec", "breakpoint", "os.system", "torch.load", "torch.save", "pickle.load", "pickle.loads"}
FORBIDDEN_MODULES = {"pickle", "dill", "joblib", "cloudpickle"}
FORBIDDEN_KEYWORDS = {"shell", "trust_remote_code"}


def room_of(path: Path, package: Path) -> str:
    """`src/moekit/plan/fit.py` -> plan; `src/moekit/bank.py` -> bank; the package's own `__init__` -> moekit."""
    parts = path.relative_to(package).with_suffix("").parts
    return "moekit" if parts == ("__init__",) else parts[0]


def imports(source: str, package: tuple[str, ...] = ()) -> Iterator[tuple[int, str]]:
    """Every module a source imports, wherever in it, as (line, dotted name); the names of `from a import b` too.

    `package` is where the file lives, such as ("moekit", "plan"), and resolves relative imports.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) + 1 - node.level]) if node.level else []
            stem = ".".join(base + ([node.module] if node.module else []))
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


def package_of(path: Path, package: Path) -> tuple[str, ...]:
    """`src/moekit/plan/fit.py` -> ("moekit", "plan")."""
    return path.relative_to(package.parent).parts[:-1]


def floor_faults(source: str, room: str, package: tuple[str, ...] = ()) -> list[str]:
    """Imports that do not go strictly downwards. A room may import itself; only `cli` may import the package's face."""
    faults = []
    for line, name in imports(source, package):
        parts = name.split(".")
        if parts[0] != "moekit":
            continue
        target = parts[1] if len(parts) > 1 else "moekit"
        if target == "__version__" or room in (target, "moekit"):
            continue
        if target not in FLOORS:
            if room != "cli" and (len(parts) > 1 or _uses_face(source)):
                faults.append(f"{line}: imports {name}, which is the package's face or an unknown room")
        elif FLOORS[target] >= FLOORS[room] and (room, target) not in ALLOWED:
            faults.append(f"{line}: {room} (floor {FLOORS[room]}) imports {target} (floor {FLOORS[target]})")
    return faults


def _uses_face(source: str) -> bool:
    """Whether anything but `moekit.__file__` and the like is taken from a bare `import moekit`."""
    return any(
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "moekit"
        and not node.attr.startswith("__")
        for node in ast.walk(ast.parse(source))
    )


def _docstrings(tree: ast.AST) -> set[int]:
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found.add(id(node.value))
        if isinstance(node, holders) and ast.get_docstring(node) is not None:
            found.add(id(node.body[0].value))
    return found


def family_faults(source: str) -> list[str]:
    """Names of model families in identifiers and in string values; docstrings and comments may cite them."""
    tree = ast.parse(source)
    prose = _docstrings(tree)
    faults = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            names = [node.value]
        elif isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef | ast.alias):
            names = [node.name]
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            names = [node.arg]
        faults += [f"{getattr(node, 'lineno', 0)}: family name in {name!r}" for name in names if FAMILIES.search(name)]
    return faults


def print_faults(source: str) -> list[str]:
    """Calls of `print`, and writes to standard output or error."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            faults.append(f"{node.lineno}: print")
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr"):
            faults.append(f"{node.lineno}: {ast.unparse(node)}")
    return faults


def safety_faults(source: str) -> list[str]:
    """Pickle, remote code, shell strings, dynamic evaluation."""
    faults = [f"{line}: imports {name}" for line, name in imports(source) if name.split(".")[0] in FORBIDDEN_MODULES]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in FORBIDDEN_CALLS:
                faults.append(f"{node.lineno}: calls {ast.unparse(node.func)}")
            for keyword in node.keywords:
                constant = isinstance(keyword.value, ast.Constant)
                if keyword.arg in FORBIDDEN_KEYWORDS and not (constant and keyword.value.value is False):
                    faults.append(f"{node.lineno}: {keyword.arg}={ast.unparse(keyword.value)}")
    return faults


def function_faults(source: str) -> list[str]:
    """Functions whose body does not fit on a screen; signature and docstring are not counted."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            if lines > MAX_FUNCTION:
                faults.append(f"{node.lineno}: {node.name} has {lines} lines, at most {MAX_FUNCTION}")
    return faults


def text_faults(text: str, ascii_only: bool = True) -> list[str]:
    """Paths of somebody's machine; characters outside ASCII where the file is code."""
    machine = re.compile(r"(?<![\w.\-/])/(?:" + "|".join(("work", "root", "home", "Users")) + r")/[\w.]")
    faults = []
    for number, line in enumerate(text.splitlines(), 1):
        if machine.search(line):
            faults.append(f"{number}: path of a machine: {line.strip()[:80]}")
        if ascii_only and not line.isascii():
            faults.append(f"{number}: not ASCII: {line.strip()[:80]}")
    return faults


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Import circles in a module graph, each as the list of its modules."""
    found, state, trail = [], dict.fromkeys(graph, 0), []

    def visit(module: str) -> None:
        state[module] = 1
        trail.append(module)
        for target in sorted(graph[module] & graph.keys()):
            if state[target] == 1:
                found.append(trail[trail.index(target) :])
            elif state[target] == 0:
                visit(target)
        trail.pop()
        state[module] = 2

    for module in sorted(graph):
        if state[module] == 0:
            visit(module)
    return found


def load_time_graph(package: Path) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports when it is loaded (imports inside functions do not count)."""
    modules = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        tree = ast.parse(path.read_text("utf-8"))
        top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        names = {name for _, name in imports(ast.unparse(top), package_of(path, package))}
        targets = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = (targets & modules.keys()) - {module}
    return graph

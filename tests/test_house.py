"""The rules of the house hold everywhere, and each rule catches the fault it is there for."""

import ast
import statistics
import subprocess
from pathlib import Path

import pytest

import house
from moekit import systems

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "moekit"
FILES = sorted(PACKAGE.rglob("*.py"))
# Training the embedded model means naming the stock family it is an instance of.
FAMILY_EXCEPTIONS = {"lab/_recipe.py"}
# Run as scripts in a process of their own, whose standard output is what they return.
PROGRAMS = {"plan/reload_check.py"}


def _each(rule, files=FILES):
    faults = []
    for path in files:
        faults += [f"{path.relative_to(ROOT)}:{fault}" for fault in rule(path, path.read_text("utf-8"))]
    return "\n".join(faults)


def test_imports_go_down():
    assert not _each(
        lambda path, text: house.floor_faults(text, house.room_of(path, PACKAGE), house.package_of(path, PACKAGE))
    )


def test_every_room_has_a_floor():
    rooms = {house.room_of(path, PACKAGE) for path in FILES} - {"moekit"}
    assert rooms <= house.FLOORS.keys()


def test_no_import_circles():
    assert house.cycles(house.load_time_graph(PACKAGE)) == []


def test_family_names_only_where_families_live():
    files = [
        path
        for path in FILES
        if house.room_of(path, PACKAGE) not in house.FAMILY_ROOMS
        and path.relative_to(PACKAGE).as_posix() not in FAMILY_EXCEPTIONS
    ]
    assert not _each(lambda path, text: house.family_faults(text), files)


def test_print_only_in_cli():
    files = [
        path
        for path in FILES
        if house.room_of(path, PACKAGE) != "cli" and path.relative_to(PACKAGE).as_posix() not in PROGRAMS
    ]
    assert not _each(lambda path, text: house.print_faults(text), files)


def test_no_pickle_remote_code_or_shell():
    assert not _each(lambda path, text: house.safety_faults(text))


def test_functions_fit_a_screen():
    assert not _each(lambda path, text: house.function_faults(text))


def test_files_are_small():
    sizes = {path: len(path.read_text("utf-8").splitlines()) for path in FILES}
    assert {str(path): size for path, size in sizes.items() if size > house.MAX_FILE} == {}
    assert statistics.median(sizes.values()) <= house.MEDIAN_FILE


def test_every_room_says_what_it_is():
    silent = [path for path in FILES if not ast.get_docstring(ast.parse(path.read_text("utf-8")))]
    assert silent == []


def test_no_machine_paths_and_ascii_code():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.decode().split("\0") if name]
    kinds = {".py": True, ".toml": True, ".md": False, ".txt": False, ".json": False, ".yml": False, "": False}
    texts = [ROOT / name for name in names if Path(name).suffix in kinds and (ROOT / name).is_file()]
    small = [path for path in texts if path.stat().st_size < 1_000_000]
    assert not _each(lambda path, text: house.text_faults(text, kinds[path.suffix]), small)


def test_headers_are_complete():
    assert {header.where: header.problems for header in systems.headers() if header.problems} == {}


def test_every_method_has_a_header_and_a_test():
    wing = PACKAGE / "compress"
    with_header = {header.where for header in systems.headers()}
    methods = [path for path in sorted(wing.glob("*.py")) if not path.name.startswith("_")]
    assert [path.name for path in methods if f"compress/{path.name}" not in with_header] == []
    tests = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests" / "compress").glob("test_*.py"))
    untested = [path.stem for path in methods if path.stem not in tests and path.stem.replace("_", "-") not in tests]
    assert untested == []


def test_methods_do_not_import_each_other():
    wing = PACKAGE / "compress"
    stems = {path.stem for path in wing.glob("*.py") if not path.name.startswith("_")}
    faults = [
        f"{path.name}:{line} imports {name}"
        for path in sorted(wing.glob("*.py"))
        if not path.name.startswith("_")
        for line, name in house.imports(path.read_text("utf-8"))
        if name.startswith("moekit.compress.") and name.split(".")[2] in stems
    ]
    assert faults == []


@pytest.mark.parametrize(
    ("source", "room", "caught"),
    [
        ("from moekit.plan import Plan", "profile", True),
        ("def f():\n    from moekit.cli import main", "lab", True),
        ("from moekit.profile import Profile", "measure", True),
        ("from moekit.blocks import blocks", "kernels", True),
        ("from moekit import profile", "measure", True),
        ("import moekit\nmoekit.fit()", "plan", True),
        ("import moekit\nmoekit.__file__", "plan", False),
        ("from ..cli import main", "plan", True),
        ("from .x import y", "plan", False),
        ("from moekit.blocks import blocks", "checkpoint", False),
        ("from moekit.profile import Profile", "plan", False),
        ("from moekit.plan._solver import solve\nimport torch", "plan", False),
        ("import moekit", "cli", False),
    ],
)
def test_floor_rule(source, room, caught):
    assert bool(house.floor_faults(source, room, ("moekit", room))) is caught


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        (house.family_faults, "x = 'Qwen3MoeConfig'", "'''Claim: Qwen3-30B halves.'''\n# mixtral\nx = 'moe'"),
        (house.family_faults, "def load_mixtral(): ...", "def load(): ..."),
        (house.family_faults, "from transformers import OlmoeConfig", "from transformers import AutoConfig"),
        (house.print_faults, "print('x')", "log('x')"),
        (house.print_faults, "import sys\nsys.stderr.write('x')", "import sys\nsys.exit(1)"),
        (house.safety_faults, "import pickle", "import json"),
        (house.safety_faults, "import torch\ntorch.load('x')", "from safetensors.torch import load_file"),
        (house.safety_faults, "run('ls', shell=True)", "run(['ls'])"),
        (house.safety_faults, "f(trust_remote_code=flag)", "f(trust_remote_code=False)"),
        (house.function_faults, "def f():\n" + "    x = 1\n" * 51, "def f():\n" + "    x = 1\n" * 50),
        (house.text_faults, "path = '/" + "home/someone/x'", "path = 'src/home/x'"),
        (house.text_faults, "x = '\u00e9'", "x = 'e'"),
    ],
)
def test_rule_catches_its_fault(rule, bad, good):
    assert rule(bad)
    assert not rule(good)


def test_cycle_rule():
    assert house.cycles({"a": {"b"}, "b": {"a"}}) == [["a", "b"]]
    assert house.cycles({"a": {"b"}, "b": set()}) == []


def test_test_files_have_names_of_their_own():
    """pytest imports them all as top-level modules: two of one name shadow each other."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []

"""The layering of the design page, section 9: who may import whom, read from the source."""

import ast
import sys
from pathlib import Path

import pytest

from dlrscale import catalogue

PACKAGE = Path(__file__).resolve().parents[2] / "dlrscale"
# A module imports only modules that stand before it. `embedded_model` holds data, no code.
ORDER = (
    "__init__", "errors", "record", "shapes", "folders", "catalogue", "config", "search", "planner", "report",
    "tracking", "launcher", "measure", "engine", "modeling", "dlr", "models", "surgery", "data", "evaluate",
    "train", "distil", "export", "attacks", "jobs", "cli",
)  # fmt: skip
WITHOUT_TORCH = (
    "errors",
    "record",
    "shapes",
    "folders",
    "catalogue",
    "config",
    "search",
    "planner",
    "report",
    "tracking",
    "launcher",
)
DOORS = {
    "deepspeed": ("engine", "launcher/node"),
    "mlflow": ("tracking",),
    "optuna": ("search/sampler",),
    "click": ("cli",),
    "peft": ("attacks/lora",),
    "accelerate": ("models", "export"),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(file):
    """The entry of ORDER that a file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def place(file):
    return file.relative_to(PACKAGE).as_posix().removesuffix(".py")


def imports(file, top_level=False):
    """Dotted names that a file imports: (name, line), `from a import b` as a.b; also inside functions.

    With `top_level`, those alone that run when the module is imported; TYPE_CHECKING blocks are no imports then.
    """
    found = []

    def walk(node):
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = list(file.relative_to(PACKAGE.parent).with_suffix("").parts)
            base = ".".join(parts[: len(parts) - node.level]) if node.level else ""
            stem = ".".join(filter(None, [base, node.module]))
            found.extend((f"{stem}.{alias.name}", node.lineno) for alias in node.names)
        elif (
            isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            and top_level
            or isinstance(node, ast.If)
            and "TYPE_CHECKING" in ast.dump(node.test)
            and top_level
        ):
            return
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(ast.parse(file.read_text(encoding="utf-8")))
    return found


def test_every_module_has_its_place_in_the_order():
    assert {module_of(f) for f in FILES} == set(ORDER)


def test_the_readme_shows_the_tree_in_that_order():
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    tree = readme.split("\ndlrscale/ ", 1)[1].split("\nlaunch/", 1)[0].splitlines()[1:]
    shown = [line.split()[0].removesuffix("/").removesuffix(".py") for line in tree]
    assert shown == [*ORDER, "embedded_model"]


@pytest.mark.parametrize("file", FILES, ids=place)
def test_a_module_imports_only_modules_above_it(file):
    own, wrong = ORDER.index(module_of(file)), []
    for name, line in imports(file):
        parts = name.split(".")
        if parts[0] != "dlrscale":
            continue
        other = parts[1] if len(parts) > 1 and parts[1] in ORDER else "__init__"
        if ORDER.index(other) > own:
            wrong.append(f"{place(file)}.py:{line} imports {other}")
    assert not wrong, wrong


@pytest.mark.parametrize("file", FILES, ids=place)
def test_each_package_has_one_door(file):
    wrong = []
    for name, line in imports(file):
        doors = DOORS.get(name.split(".")[0])
        if doors is not None and not any(place(file) == d or module_of(file) == d for d in doors):
            wrong.append(f"{place(file)}.py:{line} imports {name}")
    assert not wrong, wrong


def test_launch_scripts_are_thin():
    for file in sorted((PACKAGE.parent / "launch").glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert {n.split(".")[0] for n in names} <= {"sys", "click", "dlrscale"}, file.name
        assert len(tree.body) <= 6, file.name


@pytest.mark.parametrize("file", [f for f in FILES if module_of(f) in WITHOUT_TORCH], ids=place)
def test_no_torch_above_the_line(file):
    heavy = {"torch", "transformers", "deepspeed", "numpy", "peft", "datasets"}
    wrong = [f"line {line}: {name}" for name, line in imports(file, top_level=True) if name.split(".")[0] in heavy]
    assert not wrong, wrong


def test_torch_free_modules_load_no_torch():
    import subprocess

    names = ", ".join(f"dlrscale.{n}" for n in WITHOUT_TORCH if list(PACKAGE.glob(f"{n}*")) and n != "planner")
    code = f"import sys, {names}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("file", [f for f in FILES if module_of(f) == "modeling"], ids=place)
def test_modeling_imports_torch_transformers_and_its_own_folder(file):
    for name, line in imports(file):
        root = name.split(".")[0]
        assert root in ("torch", "transformers", "collections") or name.startswith("dlrscale.modeling."), (
            name,
            line,
        )
        assert root != "transformers" or name.count(".") == 1, (name, line)  # its public names alone
    # An exported copy has no package around it: its own folder is named by a dot alone.
    assert "dlrscale.modeling" not in file.read_text(encoding="utf-8")
    assert "import dlrscale" not in file.read_text(encoding="utf-8")


VALUES = {axis: set(catalogue.choices(axis)) - {usual} for axis, usual in catalogue.AXES.items()}


def test_the_catalogue_and_the_files_of_attacks_hold_together():
    """One file per value of an axis, and one per lever that acts inside a model, named after its strategy."""
    shared = {"--init--", "levers", "stored", "chosen", "students", "rounding"}
    files = {f.stem.replace("_", "-") for f in (PACKAGE / "attacks").glob("*.py")} - shared
    values = set().union(*VALUES.values())
    assert values <= files
    assert files - values <= set(catalogue.STRATEGIES)


def test_each_attack_file_has_its_function():
    from dlrscale import attacks

    functions = {"transform": ("apply",), "trainable": ("choose",), "gradient": ("forward", "objective")}
    for axis, names in VALUES.items():
        for name in names:
            assert any(callable(getattr(attacks.find(name), function, None)) for function in functions[axis]), name


def test_modules_and_functions_stay_small():
    """Near 400 lines a module and near 60 a function."""
    long = {place(f): n for f in FILES if (n := len(f.read_text(encoding="utf-8").splitlines())) > 500}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (n := node.end_lineno - node.lineno + 1) > 75:
                long[f"{place(file)}.{node.name}"] = n
    assert not long, long

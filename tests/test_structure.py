"""The structure of the package: limits on size, no import cycles, a light import, docstrings.

Which parts may import which is in pyproject.toml ([tool.importlinter]); `lint-imports` checks it.
Every message lists `file:line` and, for a limit, the count.
"""

import ast
import doctest
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import quick
import thinned

import torch_feather

SRC = Path(__file__).parents[1] / "src"
PACKAGE = "torch_feather"
PARSER = doctest.DocTestParser()

FILE_LINES = 400
FUNCTION_LINES = 60  # from `def` to the last line, docstring included
PUBLIC_METHODS = 20

# Not part of the core: users of it, in the order of [tool.importlinter].
ABOVE_THE_CORE = {
    "analysis",
    "cli",
    "export",
    "models",
    "native",
    "recipes",
    "runtime",
    "studies",
    "training",
}
# Third-party packages that the core may import, and the number of files for optional ones.
REQUIRED = {"torch", "numpy"}
OPTIONAL = {"llvmlite": 1, "triton": 4}  # kernels stand beside the form that they replace

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


class Module:
    """One file of the package, parsed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_text(encoding="utf-8")
        self.lines = self.text.splitlines()
        self.tree = ast.parse(self.text)
        self.is_package = path.name == "__init__.py"
        parts = path.relative_to(SRC).with_suffix("").parts
        self.name = ".".join(parts[:-1] if self.is_package else parts)

    @property
    def part(self) -> str:
        """The file or folder right below the package; empty for its `__init__`."""
        return self.name.partition(".")[2].partition(".")[0]

    def at(self, node: ast.AST) -> str:
        """`file:line` of a node."""
        return f"{self.path.relative_to(SRC.parent)}:{node.lineno}"

    def imports(self) -> Iterator[tuple[str, ast.AST]]:
        """Absolute names of all imports, also those in functions and under TYPE_CHECKING.

        `from a import b` yields `a.b`; whether `b` is a module is the caller's question.
        """
        package = self.name if self.is_package else self.name.rpartition(".")[0]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((alias.name, node) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package.split(".")
                base = base[: len(base) - node.level + 1] if node.level else []
                base += [node.module] if node.module else []
                yield from ((".".join([*base, alias.name]), node) for alias in node.names)


@cache
def modules() -> dict[str, Module]:
    found = [Module(path) for path in sorted((SRC / PACKAGE).rglob("*.py"))]
    return {module.name: module for module in found}


def definitions(kind: type | tuple[type, ...]) -> Iterator[tuple[Module, Definition]]:
    for module in modules().values():
        for node in ast.walk(module.tree):
            if isinstance(node, kind):
                yield module, node


def length(node: Function) -> int:
    return node.end_lineno - node.lineno + 1


def reason_for_length(module: Module, node: Function) -> bool:
    """Whether `# long: <reason>` stands on the `def` line, or above it and its decorators."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    above = first - 1
    while above and module.lines[above - 1].strip().startswith("#"):
        above -= 1
    return any(re.search(r"# long: \w", line) for line in module.lines[above : node.lineno])


def public_methods(node: ast.ClassDef) -> set[str]:
    return {
        child.name
        for child in node.body
        if isinstance(child, Function) and not child.name.startswith("_")
    }


def assert_none(found: list[str]) -> None:
    if found:
        pytest.fail(f"{len(found)} found\n" + "\n".join(found), pytrace=False)


def test_files_are_short():
    long = [
        f"{module.path.relative_to(SRC.parent)}:1 {len(module.lines)} lines (limit {FILE_LINES})"
        for module in modules().values()
        if len(module.lines) > FILE_LINES
    ]
    assert_none(long)


def test_functions_are_short_or_say_why_not():
    long = [
        f"{module.at(node)} {node.name}: {length(node)} lines (limit {FUNCTION_LINES}); "
        "shorten it, or give the reason above it: `# long: <reason>`"
        for module, node in definitions(Function)
        if length(node) > FUNCTION_LINES and not reason_for_length(module, node)
    ]
    assert_none(long)


def test_reasons_for_length_are_needed():
    needed = sum(
        reason_for_length(module, node)
        for module, node in definitions(Function)
        if length(node) > FUNCTION_LINES
    )
    given = sum(module.text.count("# long: ") for module in modules().values())
    assert given == needed, f"{given} comments `# long:`, {needed} functions that need one"


def test_classes_have_few_public_methods():
    large = [
        f"{module.at(node)} {node.name}: {count} public methods (limit {PUBLIC_METHODS})"
        for module, node in definitions(ast.ClassDef)
        if (count := len(public_methods(node))) > PUBLIC_METHODS
    ]
    assert_none(large)


def imported_modules(module: Module) -> dict[str, ast.AST]:
    """Modules of the package that this one imports by name, each with one import statement."""
    found: dict[str, ast.AST] = {}
    for name, node in module.imports():
        # `from package import name` depends on the submodule `name`, else on the package itself.
        target = name if name in modules() else name.rpartition(".")[0]
        if target in modules() and target != module.name:
            found.setdefault(target, node)
    return found


def cycles(imports: dict[str, dict[str, ast.AST]]) -> list[list[str]]:
    """The shortest cycle through each module that is on one; each cycle once."""
    found = {}
    for start in imports:
        paths, seen = [[start]], set()
        while paths:
            path = paths.pop(0)
            for target in imports[path[-1]]:
                if target == start:
                    found.setdefault(frozenset(path), path)
                    paths = []
                    break
                if target not in seen:
                    seen.add(target)
                    paths.append([*path, target])
    return list(found.values())


def test_no_module_imports_itself_over_others():
    imports = {name: imported_modules(module) for name, module in modules().items()}
    found = [
        "\n  ".join(
            [f"a cycle of {len(cycle)} modules"]
            + [
                f"{modules()[source].at(imports[source][target])} {source} imports {target}"
                for source, target in zip(cycle, [*cycle[1:], cycle[0]], strict=True)
            ]
        )
        for cycle in cycles(imports)
    ]
    assert_none(found)


def test_the_core_imports_pytorch_and_numpy_alone():
    found, optional = [], {name: set() for name in OPTIONAL}
    for module in modules().values():
        if module.part in ABOVE_THE_CORE:
            continue
        for name, node in module.imports():
            top = name.partition(".")[0]
            if top in OPTIONAL:
                optional[top].add(module.at(node))
            elif top not in REQUIRED | {PACKAGE} and top not in sys.stdlib_module_names:
                found.append(f"{module.at(node)} imports {top}")
    for top, places in optional.items():
        if len({place.partition(":")[0] for place in places}) > OPTIONAL[top]:
            found += [f"{place} imports {top} (limit {OPTIONAL[top]} file)" for place in places]
    assert_none(found)


def test_import_is_light():
    """`import torch_feather` loads the core alone, beyond what PyTorch loads by itself."""
    code = (
        "import sys, torch, numpy; before = set(sys.modules); import torch_feather; "
        "print(*(set(sys.modules) - before))"
    )
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    loaded = [name.split(".") for name in output.split()]
    ours = {parts[1] for parts in loaded if parts[0] == PACKAGE and len(parts) > 1}
    others = {parts[0] for parts in loaded} & {
        *("matplotlib", "yaml", "typer", "rich", "llvmlite", "safetensors", "jinja2"),
        *("timm", "torchvision", "transformers", "huggingface_hub", "onnx", "PIL", "pyarrow"),
        *("sklearn", "scipy"),
    }
    heavy = sorted(f"{PACKAGE}.{name}" for name in ours & ABOVE_THE_CORE) + sorted(others)
    assert ours, "the package was not loaded"
    assert_none(heavy)


def public_definitions() -> Iterator[tuple[Module, Definition]]:
    """Functions and classes of a module, public in name and place."""
    for module in modules().values():
        if any(part.startswith("_") for part in module.name.split(".")):
            continue
        for node in module.tree.body:
            if isinstance(node, Definition) and not node.name.startswith("_"):
                yield module, node


def test_public_functions_and_classes_are_documented():
    found = [
        f"{module.at(node)} {node.name} has no docstring"
        for module, node in public_definitions()
        if not ast.get_docstring(node)
    ]
    assert_none(found)


def test_no_docstring_only_refers_to_another():
    """An overriding method inherits its docstring; `See X` hides it."""
    found = [
        f"{module.at(node)} {node.name}: {text!r}"
        for module, node in definitions((*Function.__args__, ast.ClassDef))
        if re.fullmatch(r"(As|See|Same as|Like) (also |the )?[`:\w.()]+\.?", text := doc(node))
    ]
    assert_none(found)


def doc(node: Definition) -> str:
    return ast.get_docstring(node) or ""


def test_public_names_have_an_example():
    """Of functions and classes; test_doctests.py runs them."""
    found = []
    for name in torch_feather.__all__:
        value = getattr(torch_feather, name)
        if not callable(value) or (inspect.isclass(value) and issubclass(value, Exception)):
            continue
        if ">>> " not in (inspect.getdoc(value) or ""):
            file = Path(inspect.getsourcefile(value)).name
            found.append(f"{file}:{inspect.getsourcelines(value)[1]} {name} has no example")
    assert_none(found)


def examples(node: Definition) -> list[doctest.Example]:
    """The examples of a function, or of a class and its methods."""
    children = node.body if isinstance(node, ast.ClassDef) else []
    documented = [one for one in (node, *children) if isinstance(one, Definition)]
    return [example for one in documented for example in PARSER.get_examples(doc(one))]


def test_public_functions_and_classes_have_an_example():
    """test_doctests.py runs them."""
    found = [
        f"{module.at(node)} {node.name} has no example; add one, or make it private"
        for module, node in public_definitions()
        if not examples(node)
    ]
    assert_none(found)


def test_examples_are_not_skipped():
    found = [
        f"{module.at(node)} {node.name} has an example that does not run"
        for module, node in definitions((*Function.__args__, ast.ClassDef))
        if any(example.options.get(doctest.SKIP) for example in examples(node))
    ]
    assert_none(found)


def test_tests_that_are_quick_or_thinned_exist():
    """A test that was renamed has another name in tests/quick.py and tests/thinned.py, too."""
    found = []
    cases = [(file, test) for file, tests in thinned.EVERY.items() for test in tests]
    for file, test in quick.listed() + cases:
        path = quick.TESTS / file
        if not path.exists():
            found.append(f"tests/{file} does not exist")
        elif test and f"def {test}(" not in path.read_text(encoding="utf-8"):
            found.append(f"tests/{file} has no {test}")
    assert_none(found)

"""The house rules that can be read from the source: import order, small closures, and what must not be written."""

import ast
import graphlib
import sys
from functools import cache
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "fs_psm_hf"

# A module imports from its own layer and from those above it in this list, never from those below, and never in a
# circle. A sub-package stands for all its modules; "" is fs_psm_hf/__init__.py.
LAYERS = [
    ["heap", "pixels", "noise", "certification.bounds", "certification.confidence", "certification.bands"],
    [
        "configuration_fs_psm",
        "loading",
        "truncation",
        "unet",
        "purifier",
        "mapper",
        "smoothing",
        "compiled",
        "packed",
        "features",
        "feature_cache",
        "passes",
        "certification.identity",
        "certification.certified",
        "certification.certificate",
        "certification.adaptive",
    ],
    ["modeling_psm", "idefics_vision", "components", "modeling_fs_psm"],
    [
        "host_kinds",
        "openflamingo",
        "zero_shot",
        "hosts",
        "checkpoints",
        "conversion",
        "conversion_open_clip",
        "hub",
        "cards",
        "certification",
        "inputs",
        "",
    ],
    ["training", "attacks"],
    ["evaluation", "plots", "plots_attacks", "demo"],
    ["cli"],
]
LAYER_OF = {module: index for index, layer in enumerate(LAYERS) for module in layer}


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
each_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module or "fs_psm_hf")


@cache
def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def layer_of(module):
    """The layer of the longest listed prefix; a module of the top folder must be listed by its own name."""
    name = module
    while name not in LAYER_OF and "." in name:
        name = name.rpartition(".")[0]
    assert name in LAYER_OF, f"fs_psm_hf/{module.replace('.', '/')}.py has no layer yet: give it one in LAYERS"
    return LAYER_OF[name]


def read_imports(tree, folder):
    """Yields (inside, name, dots) for each import in a file of `folder`, wherever in the file it stands.

    For our own modules `inside` is True and `name` is relative to the package; for others `name` is the full one.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            if node.level:
                parts = [*folder[: len(folder) - node.level + 1], *parts]
            found = [(".".join([*parts, alias.name]), node.level) for alias in node.names]
        else:
            continue
        for name, dots in found:
            root, _, rest = name.partition(".")
            if root != "fs_psm_hf":
                yield False, name, dots
                continue
            while rest not in MODULES:  # the last parts name something inside a module
                rest = rest.rpartition(".")[0]
            yield True, rest, dots


def imports_of(module):
    path = MODULES[module]
    return list(read_imports(parse(path), ["fs_psm_hf", *path.relative_to(PACKAGE).parts[:-1]]))


def inner_imports(module):
    return {name for inside, name, _ in imports_of(module) if inside}


def faults(tree, module):
    """Yields (line, what is wrong) for what must not be written in the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield node.lineno, "assert outside the tests"
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            # It turns `config_class` into a string and switches the type checks of strict configs off.
            if module.startswith(("configuration_", "modeling_")):
                yield node.lineno, "`from __future__` in a configuration or modeling file"
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "register_buffer":
            # `from_pretrained` fills a non-persistent buffer with whatever the memory held.
            persistent = [
                *node.args[2:3],
                *(keyword.value for keyword in node.keywords if keyword.arg == "persistent"),
            ]
            if [getattr(value, "value", None) for value in persistent] not in ([], [True]):
                yield node.lineno, "a buffer that is not persistent"


@each_module
def test_no_upward_import(module):
    upward = sorted(name for name in inner_imports(module) if layer_of(name) > layer_of(module))
    assert not upward


@each_module
def test_nothing_forbidden_is_written(module):
    assert list(faults(parse(MODULES[module]), module)) == []


def test_no_circle():
    order = list(graphlib.TopologicalSorter({module: inner_imports(module) for module in MODULES}).static_order())
    assert set(order) == set(MODULES)


@pytest.mark.parametrize("module", ["certification.bounds", "certification.confidence", "certification.bands"])
def test_the_mathematics_needs_numpy_and_scipy_only(module):
    for inside, name, _ in imports_of(module):
        if inside:
            assert name in {"certification.bounds", "certification.confidence", "certification.bands"}
        else:
            assert name.partition(".")[0] in {"numpy", "scipy", *sys.stdlib_module_names}


def test_the_modeling_closure_is_flat():
    """Remote-code export copies the files that single-dot imports of one folder reach, and no others."""
    todo, closure = ["modeling_fs_psm"], set()
    while todo:
        module = todo.pop()
        if module in closure:
            continue
        closure.add(module)
        for inside, name, dots in imports_of(module):
            if inside:
                assert dots == 1, f"`{module}` imports `{name}` with {dots} dots, must be 1"
                assert name, f"`{module}` imports from fs_psm_hf/__init__.py"
                assert "." not in name, f"`{module}` imports `{name}` from a sub-folder"
                todo.append(name)
    assert {"configuration_fs_psm", "purifier", "mapper", "smoothing"} <= closure


@pytest.mark.parametrize(
    ("source", "folder", "expected"),
    [
        ("from .noise import gaussian", [], [(True, "noise", 1)]),
        ("from . import noise, pixels", [], [(True, "noise", 1), (True, "pixels", 1)]),
        ("from ..noise import gaussian", ["attacks"], [(True, "noise", 2)]),
        ("import fs_psm_hf.noise as n", [], [(True, "noise", 0)]),
        ("from fs_psm_hf import attach", [], [(True, "", 0)]),
        ("def f():\n    from fs_psm_hf.noise import gaussian", [], [(True, "noise", 0)]),
        ("from scipy.special import ndtr", [], [(False, "scipy.special.ndtr", 0)]),
    ],
)
def test_how_imports_are_read(source, folder, expected):
    assert list(read_imports(ast.parse(source), ["fs_psm_hf", *folder])) == expected


@pytest.mark.parametrize(
    ("source", "module", "count"),
    [
        ("assert x", "noise", 1),
        ("from __future__ import annotations", "modeling_fs_psm", 1),
        ("from __future__ import annotations", "noise", 0),
        ("self.register_buffer('a', x, persistent=False)", "mapper", 1),
        ("self.register_buffer('a', x, False)", "mapper", 1),
        ("self.register_buffer('a', x, persistent=flag)", "mapper", 1),
        ("self.register_buffer('a', x)", "mapper", 0),
        ("self.register_buffer('a', x, persistent=True)", "mapper", 0),
    ],
)
def test_what_counts_as_a_fault(source, module, count):
    assert len(list(faults(ast.parse(source), module))) == count

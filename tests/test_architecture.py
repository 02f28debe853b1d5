"""The layout that DESIGN.md promises: who may import whom, how long a module may be, which words are used."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import coral

ROOT = Path(coral.__file__).parent
MODULES = {
    ".".join(("coral", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}

# What a part must not import. Training and decoding meet only in the checkpoint.
FORBIDDEN = {
    "coral.data": ("coral.decoding", "coral.training"),
    "coral.drafter": ("coral.training", "coral.decoding"),
    "coral.training": ("coral.decoding",),
    "coral.decoding": ("coral.training",),
}
# Outlets: imported by nobody but the command line, which wires them (and the module that starts it).
OUTLETS = (
    "coral.bench",
    "coral.cli",
    "coral.cli_bench",
    "coral.cli_data",
    "coral.cli_export",
    "coral.cli_hub",
    "coral.cli_tune",
    "coral.chat",
    "coral.demo",
    "coral.export",
    "coral.in_transformers",
    "coral.serve",
    "coral.tuning",
)
MAY_USE_OUTLETS = {
    "coral.card": ("coral.export",),  # its commands serve the drafter
    "coral.cli": OUTLETS,
    "coral.cli_bench": ("coral.bench",),
    "coral.cli_export": ("coral.export",),
    "coral.cli_hub": ("coral.bench.report", "coral.bench.results"),
    "coral.custom_generate.generate": ("coral.in_transformers",),  # what transformers runs
    "coral.embedded.drafter.custom_generate.generate": ("coral.in_transformers",),
    "coral.cli_tune": ("coral.bench.deepen", "coral.bench.suites", "coral.tuning"),
    # Tuning and bench measure plain decoding and compiled sizes in the same way.
    "coral.tuning.costs": ("coral.bench.costs",),
    "coral.tuning.run": ("coral.bench.costs", "coral.bench.methods"),
    "coral.__main__": ("coral.cli",),
    "coral.demo": (
        "coral.bench.methods",
        "coral.chat",
    ),  # the demo lets Hugging Face write as the bench does, and streams as chat does
}
# Imports inside functions that keep two modules out of a circle; each needs a reason.
LATE = {
    (
        "coral.target",
        "coral.decoding.state",
    ): "prefill and keep return Committed, whose module imports the cache",
}


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """What a module imports from this package, and whether on import (or only when a function runs)."""
    yield from _imports(ast.parse(MODULES[module].read_text(encoding="utf-8")), True)


def _imports(node: ast.AST, at_once: bool) -> Iterator[tuple[str, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            found = [f"{child.module}.{alias.name}" for alias in child.names]
            names = [name if name in MODULES else str(child.module) for name in found]
        else:
            within = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from _imports(child, at_once and not within)
            continue
        yield from ((name, at_once) for name in names if inside(name, "coral"))


def inside(module: str, part: str) -> bool:
    return module == part or module.startswith(f"{part}.")


def test_the_import_order_holds() -> None:
    """Stops the two halves from growing together: each can be read, and rewritten, without the other."""
    broken = []
    for module in MODULES:
        for imported, _ in imports(module):
            for part, others in FORBIDDEN.items():
                if inside(module, part) and any(inside(imported, other) for other in others):
                    broken.append(f"{module} imports {imported}")
            for outlet in OUTLETS:
                allowed = inside(module, outlet) or any(
                    inside(imported, name) for name in MAY_USE_OUTLETS.get(module, ())
                )
                if inside(imported, outlet) and not allowed:
                    broken.append(f"{module} imports {imported}")
    assert not broken


def test_the_target_knows_no_decoder() -> None:
    """Nothing below decoding imports it on loading; what is imported late is listed with its reason."""
    below = (
        "coral.target",
        "coral.cache",
        "coral.forward",
        "coral.attention",
        "coral.config",
        "coral.errors",
        "coral.files",
    )
    seen = set()
    for module in below:
        for imported, at_once in imports(module):
            if inside(imported, "coral.decoding"):
                assert not at_once and (module, imported) in LATE, f"{module} imports {imported}"
                seen.add((module, imported))
    assert seen == set(LATE)


def test_no_import_goes_round_in_a_circle() -> None:
    """Stops an import that works only in the order in which someone happened to try it."""
    after = {m: {i for i, at_once in imports(m) if at_once and i in MODULES and i != m} for m in MODULES}
    while free := {module for module, needed in after.items() if not needed}:
        after = {m: needed - free for m, needed in after.items() if m not in free}
    assert not after


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short_and_use_our_words(module: str) -> None:
    """The words to avoid are in the glossary: two words for one thing hide that it is one."""
    text = MODULES[module].read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    if not inside(module, "coral.export"):  # whose tables hold the words of others
        assert not re.findall(r"(?i)verifier|\bea_|_ea_|hidden_state_big|ckpt|\bttt|_ttt", text)


def test_the_checks_see_what_they_are_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of absence passes on anything if it looks at nothing."""
    module = tmp_path / "bad.py"
    module.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import coral.bench\n"
        "def f():\n    from coral.decoding import tree\nimport coral.cli\n"
        "from coral.errors import CoralError\n"
    )
    monkeypatch.setitem(MODULES, "coral.bad", module)
    found = {("coral.decoding.tree", False), ("coral.cli", True), ("coral.errors", True)}
    assert set(imports("coral.bad")) == found and len(MODULES) > 40

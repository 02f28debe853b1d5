"""The layout that DESIGN.md promises: who may import whom, how long a module may be, which words are used."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import coral
from coral.drafters import kinds
from coral.drafters.heads import store as heads

ROOT = Path(coral.__file__).parent
MODULES = {
    ".".join(("coral", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}

# A room imports those in front of it; two of one line know nothing of each other.
ORDER = (
    "cache config device errors files json_file locks progress tree",
    "native",
    "gpu",
    "target",
    "decoding data",
    "drafters suites",
    "serving",
    "training api",
    "bench integrations",
    "tuning",
    "export",
    "hub",
    "cli",
)
RANK = {f"coral.{room}": rank for rank, rooms in enumerate(ORDER) for room in rooms.split()}
# Started from outside; they hand on.
STARTED = ("coral.__main__", "coral.embedded.drafter.custom_generate.generate")


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


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_the_import_order_holds() -> None:
    """Stops the parts from growing together: each can be read, and rewritten, without those behind it."""
    assert {room(module) for module in MODULES} == {*RANK, "coral", "coral.__main__", "coral.embedded"}
    for module in MODULES:
        for imported, _ in imports(module):
            here, there = room(module), room(imported)
            down = RANK.get(there, 0) < RANK.get(here, 99) or RANK[here] == 0 == RANK[there]
            if module not in STARTED and here != there != "coral":
                assert down, f"{module} imports {imported}"


def test_the_root_stays_small() -> None:
    """Stops modules that are laid down where it is easiest: the root holds what every room stands on."""
    assert len([path for path in MODULES.values() if path.parent == ROOT]) <= 12


# Names of files that come twice, and why.
TWICE = {
    "__init__": "each room has one",
    "cache": "target/gguf/ keeps converted files, the root keys and values",
    "config": "target/gguf/ reads that of a model, the root those of ours",
    "generate": "the drafter that the package ships carries a copy, as all drafters do",
    "run": "training/ defines a run, bench/ carries one out",
}


def test_a_file_is_known_by_its_name() -> None:
    """Stops imports that must be renamed at every use, and a reader who opens the wrong one of two files."""
    stems = Counter(path.stem for path in MODULES.values())
    assert {stem for stem, count in stems.items() if count > 1} == TWICE.keys()


def test_no_import_goes_round_in_a_circle() -> None:
    """Stops an import that works only in the order in which someone happened to try it."""
    after = {m: {i for i, at_once in imports(m) if at_once and i in MODULES and i != m} for m in MODULES}
    while free := {module for module, needed in after.items() if not needed}:
        after = {m: needed - free for m, needed in after.items() if m not in free}
    assert not after


KINDS = kinds.KINDS
HEADS = (*heads.OF_TARGET, *heads.KINDS)
# Outside `coral.drafters`: who names the modules of one kind of drafter or head, and why.
NAMES_A_KIND = dict.fromkeys(
    (f"coral.export.{name}" for name in ("eagle", "layout", "read", "sglang", "vllm", "vllm_coral")),
    "the plain EAGLE layout is that of the kind `feature`",
) | dict.fromkeys(
    (
        f"coral.export.{name}"
        for name in ("fused_eagle", "fused_layout", "fused_read", "fused_vllm", "llama_cpp", "read")
    ),
    "the EAGLE-3 layout is that of the kind `eagle3`",
)
NAMES_A_HEAD = {
    "coral.bench.recall": "recall is of the routed head's groups",
    "coral.export.write": "SGLang's token map is the static head's",
    "coral.integrations.vllm.model": "vLLM has the full head itself",
    "coral.training.heads": "a low-rank head is factorised",
    "coral.training.router": "a routed head's router is trained",
}


def names_one_of(module: str, room: str, kinds: tuple[str, ...]) -> bool:
    """Whether a module's text names a module of `room` that is one of these kinds."""
    word = rf"({'|'.join(kinds)})\b"
    text = MODULES[module].read_text(encoding="utf-8")
    return bool(re.search(rf"{re.escape(room)}\.{word}|from {re.escape(room)} import .*\b{word}", text))


def test_only_the_drafters_know_their_kinds() -> None:
    """Stops a kind, or a head, that can be added only by changing who decodes, trains or measures."""
    outside = [module for module in MODULES if not inside(module, "coral.drafters")]
    for room, words, excused in (
        ("coral.drafters", KINDS, NAMES_A_KIND),
        ("coral.drafters.heads", HEADS, NAMES_A_HEAD),
    ):
        assert {module for module in outside if names_one_of(module, room, words)} == excused.keys()


MODULE, FUNCTION, PARAMETERS = 340, 60, 8
"""Most lines of a module and of a function, and most parameters of one. The options of a command are its
parameters, which typer reads, so in coral.cli only the body counts."""


# What is still larger, and why.
def too_large(module: str) -> Iterator[str]:
    """A module, or functions of it, beyond the limits."""
    text = MODULES[module].read_text(encoding="utf-8")
    if text.count("\n") > MODULE:
        yield module
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            command = inside(module, "coral.cli")
            lines = (node.end_lineno or 0) - (node.body[0] if command else node).lineno + 1
            named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            given = [each for each in named if each.arg not in ("self", "cls")]
            if lines > FUNCTION or (len(given) > PARAMETERS and not command):
                yield f"{module}.{node.name}"


def test_modules_and_functions_are_small() -> None:
    """Stops functions that do two things, and options that are handed on one by one instead of as a value."""
    assert not {name for module in MODULES for name in too_large(module)}


@pytest.mark.parametrize("module", MODULES)
def test_modules_use_our_words(module: str) -> None:
    """The words to avoid are in the glossary: two words for one thing hide that it is one."""
    text = MODULES[module].read_text(encoding="utf-8")
    if not inside(module, "coral.export"):  # whose tables hold the words of others
        assert not re.findall(r"(?i)verifier|\bea_|_ea_|hidden_state_big|ckpt|\bttt|_ttt", text)


def test_the_checks_see_what_they_are_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of absence passes on anything if it looks at nothing."""
    module = tmp_path / "bad.py"
    module.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import coral.bench\n"
        "def f():\n    from coral.decoding import text\nimport coral.cli.main\n"
        "from coral.errors import CoralError\n"
    )
    monkeypatch.setitem(MODULES, "coral.bad", module)
    assert not [*too_large("coral.bad")]
    parameters = ", ".join(f"p{i}" for i in range(PARAMETERS + 1))
    assert not names_one_of("coral.bad", "coral.drafters", KINDS)
    module.write_text(module.read_text() + "from coral.drafters import kinds, feature\n")
    assert names_one_of("coral.bad", "coral.drafters", KINDS)
    module.write_text(module.read_text() + f"def g({parameters}): ...\ndef h():\n" + "    1\n" * FUNCTION)
    assert {*too_large("coral.bad")} == {"coral.bad.g", "coral.bad.h"}
    found = {("coral.decoding.text", False), ("coral.cli.main", True), ("coral.errors", True)}
    found |= {("coral.drafters.kinds", True), ("coral.drafters.feature", True)}
    assert set(imports("coral.bad")) == found and len(MODULES) > 40

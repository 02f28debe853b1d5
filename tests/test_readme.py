"""The README's own code runs, and the files it names exist."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from tiny_tokenizer import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from coral.cli import main as cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What makes a command small enough for a test; given last, so it wins over what the README says.
SMALL = {
    "generate": ["--max-new-tokens", "8"],
    "data regenerate": ["--max-new-tokens", "8"],
    "data prepare": ["--held-out", "1"],
    "train": ["--updates", "2"],
    "tune": ["--prompts", "1", "--max-new-tokens", "6"],
    "bench": [
        "--backend=transformers",
        "--limit",
        "1",
        "--max-new-tokens",
        "4",
        "--suite",
        "questions.jsonl",
    ],
    "bench compare": [],
    "export": [],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with conversations, a question file and a small target."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    turns = [f"Question {i}?" for i in range(8)]
    conversations = [
        {"messages": [{"role": "user", "content": turn}, {"role": "assistant", "content": "Yes."}]}
        for turn in turns
    ]
    for name, records in (
        ("conversations.jsonl", conversations),
        ("questions.jsonl", [{"id": turn, "turns": [turn]} for turn in turns]),
    ):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_run(block: str, toy: Path) -> None:
    """A renamed function would leave the README's example broken."""
    exec(compile(block, "README.md", "exec"), {})


def test_commands_run(own_model: Path, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A renamed option, or a pipeline whose pieces do not fit, would break the README's commands."""
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("coral ")]
    assert len(commands) >= 8
    for command in commands:
        words = shlex.split(command.replace("Qwen/Qwen2.5-7B-Instruct", "target"))
        name = " ".join(words[1:3])
        name = name if name in SMALL else words[1]
        monkeypatch.setattr("sys.argv", [*words, *SMALL[name]])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code, command
    assert (own_model / "drafter" / "model.safetensors").exists()
    assert (own_model / "results" / "results.json").exists()


def test_named_files_exist() -> None:
    """The file tree of the README would go stale when a module is renamed."""
    tree = README.split("## The code, in reading order")[1].split("## Limits")[0]
    for line in tree.splitlines():
        path = line.strip().split("   ")[0].strip()
        for name in path.split():
            assert (ROOT / name).exists() or (ROOT / "src/coral" / name).exists(), name
    ours = {path.name for path in (ROOT / "src/coral").iterdir() if path.name != "__pycache__"}
    assert {name for name in ours if name.removesuffix("/") not in tree} == set()
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / link).exists(), link
    for target in re.findall(r"^ {4}make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), target
    assert shutil.which("make")

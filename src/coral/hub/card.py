"""The model card of a drafter: what it is for, how to use it, how it was trained and what it measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from coral.bench.acceptance import CHAIN, TREE
from coral.drafters import checkpoint
from coral.export import fused_layout, layout, write

_PACKAGE = "coral-drafter"
_DRAFTS = {"chain": f"chain of {CHAIN.num_nodes}", "tree": f"tree of {TREE.num_nodes}"}


def card(
    directory: Path,
    repo_id: str,
    *,
    license: str | None = None,
    target: str | None = None,
    data: str | None = None,
    bench: str | None = None,
) -> str:
    """README.md of the drafter in `directory`: YAML metadata, then Markdown.

    Args:
        repo_id: where it will be found.
        license: of the drafter, as the hub names licences ("apache-2.0"); None: not stated.
        target: the target's hub id, where the drafter records a directory.
        data: a sentence on the training data; None: said to be unknown.
        bench: tables in Markdown, as `bench.report.markdown` makes them.

    Raises:
        CoralError: `directory` holds no drafter.
    """
    ours = checkpoint.read_config(directory)
    recorded = ours["target"]
    # Only a target that came from the hub has a revision there; any other name is a directory of ours.
    revision = recorded["revision"] if target in (None, recorded["name"]) else None
    name = target or (recorded["name"] if revision else None)
    sections = [
        f"---\n{_metadata(name, revision, license, ours['kind'])}---",
        _introduction(repo_id, name, revision, recorded),
        f"## Use\n\n{_use(repo_id, name or 'TARGET', ours)}",
        f"## Training\n\n{_training(ours, data)}",
        f"## Measured\n\n{_measured(ours['metrics'], bench)}",
    ]
    return "\n\n".join(sections) + "\n"


def _metadata(target: str | None, revision: str | None, license: str | None, kind: str) -> str:
    own = {layout.KIND: ["eagle"], fused_layout.KIND: ["eagle3"]}.get(kind, [])
    entries = {
        "base_model": target,
        "base_model_revision": revision,
        "library_name": "coral",
        "license": license,
        "pipeline_tag": "text-generation",
        "tags": ["speculative-decoding", *own, "coral", "draft-model"],
    }
    return yaml.safe_dump({k: v for k, v in entries.items() if v is not None}, sort_keys=False)


def _introduction(repo_id: str, target: str | None, revision: str | None, recorded: dict[str, Any]) -> str:
    of = f"[{target}](https://huggingface.co/{target})" if target else "a model that is not on the hub"
    at = f" at revision `{revision}`" if revision else ""
    return (
        f"# {repo_id.split('/')[-1]}\n\n"
        f"A drafter for {of}{at} (vocabulary {recorded['vocab_size']}, hidden size "
        f"{recorded['hidden_size']}): a small network that proposes tokens, which the model checks several "
        "at a time. The model writes exactly what it would have written, only faster. It drafts for these "
        "weights only, and is no language model of its own."
    )


def _use(repo_id: str, target: str, ours: dict[str, Any]) -> str:
    parts = [
        f"With [CORAL](https://pypi.org/project/{_PACKAGE}/) (`pip install {_PACKAGE}`):",
        _code("bash", f'coral generate "What is a reef?" --target {target} --drafter {repo_id} --stats'),
        "In transformers:",
        _code(
            "python",
            "import coral\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{target}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{target}")\n'
            'inputs = tokenizer("A reef is", return_tensors="pt")\n'
            f'drafter = coral.for_transformers("{repo_id}")\n'
            "print(tokenizer.decode(model.generate(**inputs, custom_generate=drafter)[0]))",
        ),
    ]
    if lacks := write.lacks("vllm", ours):
        parts.append(f"vLLM cannot serve it, for it knows no {' and '.join(lacks)}.")
    else:
        parts += [
            "In vLLM:",
            _code("bash", write.find("vllm")[ours["kind"]].command(target, Path(repo_id), None)),
        ]
    if lacks := write.lacks("sglang", ours):
        parts.append(f"SGLang cannot serve it, for it knows no {' and '.join(lacks)}.")
    else:
        steps = [
            f"hf download {repo_id} --local-dir drafter",
            "coral export drafter --to sglang --output for-sglang",
            write.find("sglang")[ours["kind"]].command(target, Path("for-sglang"), None),
        ]
        parts += [
            "In SGLang, which reads the same network under other names:",
            _code("bash", "\n".join(steps)),
        ]
    return "\n\n".join(parts)


def _training(ours: dict[str, Any], data: str | None) -> str:
    lines = [f"Training data: {data.rstrip('.')}." if data else "The training data is not stated."]
    if recipe := ours["recipe"]:
        name = f" `{recipe['recipe']}`" if "recipe" in recipe else ""
        lines += [
            f"The recipe{name}, with all options:",
            _code("yaml", yaml.safe_dump(recipe, sort_keys=False)),
        ]
    metrics = ours["metrics"] or {}
    if {"updates", "seconds"} <= metrics.keys():
        lines.append(f"It was trained for {metrics['updates']} updates in {metrics['seconds']} seconds.")
    return "\n\n".join(lines)


def _measured(metrics: dict[str, Any] | None, bench: str | None) -> str:
    parts = []
    measured = (metrics or {}).get("acceptance")
    numbers = measured.items() if isinstance(measured, dict) else ()
    if found := {k: v for k, v in numbers if isinstance(v, int | float)}:
        parts += [
            "Acceptance length: tokens written for each forward of the model, greedy, on prompts held out "
            "from training.",
            "\n".join(
                [
                    "| draft | acceptance length |",
                    "|---|---:|",
                    *(f"| {_DRAFTS.get(k, k)} | {v:.2f} |" for k, v in found.items()),
                ]
            ),
        ]
    if bench:
        parts.append(bench.strip())
    return "\n\n".join(parts) or "Nothing yet."


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```"

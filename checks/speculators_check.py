"""Do exported drafters run in the speculators library as they do here?

The library up to 0.6 knows the `eagle` format, and is a client of `coral export --to speculators` that shares
no code with it. This script exports a drafter, loads it there, and compares names, tensors, draft features
and scores on a text. It also lets the library's own converter read `coral export --to vllm`, and reads back
what the converter wrote. Exit code 1 if anything differs.

Its environment (torch first, from the CPU index or a local build; the library asks for older versions of
torch and transformers than these, and runs with them):

    python3 -m venv speculators-env
    speculators-env/bin/pip install torch==2.13.0
    speculators-env/bin/pip install --no-deps speculators==0.6.0.2
    speculators-env/bin/pip install "transformers==5.19.0" "datasets<=5.1.0" "numpy<2.5" safetensors pydantic
    speculators-env/bin/pip install pydantic-settings loguru typer click rich httpx psutil protobuf tqdm
    speculators-env/bin/pip install huggingface-hub aiohttp openai
    PYTHONPATH=src speculators-env/bin/python checks/speculators_check.py
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from loguru import logger
from safetensors.torch import load_file
from speculators.convert.eagle.eagle_converter import EagleConverter
from speculators.convert.eagle.eagle_legacy_model import EagleSpeculator, EagleSpeculatorConfig
from torch import Tensor

from coral.drafters import checkpoint
from coral.export import write
from coral.export.read import read
from coral.target.default import TOY
from coral.target.target import Target

TEXT = "Speculative decoding lets a small model propose what a large one checks. " * 4


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--target", default=TOY / "target")
    options.add_argument("--drafter", type=Path, default=TOY / "drafter")
    asked = options.parse_args()
    logger.remove()  # the converter tells everything
    target = Target.load(str(asked.target), dtype="float32", attention="eager")
    EagleSpeculatorConfig.model_rebuild(force=True, _types_namespace={"torch": torch})
    ours = checkpoint.load(asked.drafter, target, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as place:
        exported, plain, converted = (Path(place) / name for name in ("exported", "plain", "converted"))
        write.export(asked.drafter, "speculators", exported, served="", target=target)
        write.export(asked.drafter, "vllm", plain, served="")
        EagleConverter().convert(str(plain), str(converted), str(asked.target), validate=False)
        same = compare(exported, ours, target, "coral export --to speculators")
        same &= compare(converted, ours, target, "the library's converter on coral export --to vllm")
        for directory in (exported, converted):
            back = read(directory, target).float().state_dict()
            kept = all(torch.equal(back[name], tensor) for name, tensor in ours.state_dict().items())
            print(f"read back from {directory.name}: {'bit by bit' if kept else 'CHANGED'}")
            same &= kept
    return 0 if same else 1


@torch.no_grad()
def compare(directory: Path, ours, target: Target, what: str) -> bool:
    """Whether the library computes from `directory` what our drafter does."""
    config = EagleSpeculatorConfig.from_pretrained(directory)
    config.transformer_layer_config._attn_implementation = "eager"
    theirs = EagleSpeculator.from_pretrained(
        directory, config=config, verifier=None, verifier_attachment_mode="detached"
    )
    stored, live = load_file(directory / "model.safetensors"), theirs.state_dict()
    names = stored.keys() == live.keys()
    loaded = names and all(torch.equal(live[name].float(), stored[name].float()) for name in stored)
    theirs = theirs.float().eval()
    theirs.attach_verifier(target.model, mode="train_only")
    seen: list[Tensor] = []
    theirs.transformer.register_forward_hook(
        lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    ids = torch.tensor([target.tokenizer(TEXT).input_ids])  # [1,L]
    features = target.features(ids)  # [1,L,h]
    rows = ids.shape[1] - 1  # row t: the feature of token t, the embedding of token t+1
    scores = theirs(
        input_ids=ids[:, 1:], hidden_states=features[:, :-1], attention_mask=torch.ones(1, rows)
    ).logits  # [1,L-1,V]
    own = ours(target.embed(ids[:, 1:]), features[:, :-1], torch.arange(rows)[None])  # [1,L-1,h]
    own_scores = target.head(own)
    apart = (own - seen[0].reshape(own.shape)).abs().max().item()
    scores_apart = (own_scores - scores).abs().max().item()
    agree = bool((own_scores.argmax(-1) == scores.argmax(-1)).all())
    print(
        f"{what}\n  tensors: {len(live)} there, {len(stored)} stored, names equal: {names}, values: {loaded}"
    )
    print(f"  draft features of {rows} rows: at most {apart:.1e} apart, of {own.abs().max().item():.1f}")
    print(f"  scores: at most {scores_apart:.1e} apart, of {own_scores.abs().max().item():.1f}", end="")
    print(f"; first choices equal: {agree}")
    return names and loaded and agree and scores_apart < 1e-3


if __name__ == "__main__":
    sys.exit(main())

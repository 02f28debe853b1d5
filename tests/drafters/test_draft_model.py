"""The draft model that HF assisted generation is measured with: a weak one by mistake would flatter us."""

import json
from pathlib import Path

import draft_model
import pytest
import torch
from tiny_pair import save_target
from tiny_tokenizer import tiny_tokenizer
from torch.nn.functional import kl_div, linear

from coral.bench.methods import load_assistant
from coral.data import prepared
from coral.data.features import feature_batch
from coral.data.prepare import PrepareConfig, prepare
from coral.target.target import Target


def test_the_written_out_gradient_is_autograds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops a training that goes downhill on something else than the divergence it prints."""
    monkeypatch.setattr(draft_model, "CHUNK", 3)
    torch.manual_seed(0)
    wanted, made, head = torch.randn(7, 5), torch.randn(7, 5, requires_grad=True), torch.randn(11, 5)
    log_p, log_q = linear(wanted, head).log_softmax(-1), linear(made, head).log_softmax(-1)
    expected = kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    expected.sum().backward()
    losses, gradients, agreed = draft_model.distil(wanted, made.detach(), head)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradients, made.grad)
    assert torch.equal(agreed, log_p.argmax(-1) == log_q.argmax(-1))


def test_train_a_draft_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stops documents of a packed row that see each other, and a model that no bench can load."""
    save_target(tmp_path / "target")
    rows = [
        {"messages": [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": "the " * i}]}
        for i in range(1, 40)
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = tmp_path / "data"
    prepare(
        [tmp_path / "c.jsonl"], tiny_tokenizer(), data, PrepareConfig(max_length=160, pack=True, held_out=2)
    )
    command = f"draft_model.py {data} {tmp_path / 'out'} --target {tmp_path / 'target'} --minutes 0.02"
    monkeypatch.setattr("sys.argv", f"{command} --layers 1 --held-out 2".split())
    draft_model.main()
    assert "on 2 held-out rows" in capsys.readouterr().out
    target = Target.load(tmp_path / "target")
    assistant = load_assistant(tmp_path / "out", target)
    assert assistant.config.num_hidden_layers == 1
    assert torch.equal(assistant.get_output_embeddings().weight, target.head_weight)

    whole = draft_model.shallow(target, 2)  # all of its layers, so it is the target
    dataset = prepared.load(data).dataset
    batch = feature_batch(target, dataset, range(4))
    assert batch.document_starts is not None
    torch.testing.assert_close(draft_model.features(whole, batch), batch.features, atol=1e-4, rtol=1e-4)
    assert draft_model.held_out(whole, target, dataset, [0, 1]) == (pytest.approx(0, abs=1e-4), 1.0)

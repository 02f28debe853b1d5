"""A small draft model for `coral bench --assistant`: `python benchmarks/draft_model.py DATA OUTPUT`.

It is a causal LM like the target with fewer layers, trained to write what the target writes: the soft
cross-entropy with the target's distribution (Hinton et al., arXiv 1503.02531) on the tokens of DATA that the
target wrote itself. Embedding, LM head and vocabulary are the target's, frozen; its layers start as copies of
target layers, from the first to the last at equal distances. OUTPUT is an ordinary Hugging Face model.
"""

import argparse
import math
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, PreTrainedModel

from coral.data import prepared
from coral.data.features import FeatureBatch, Rows, feature_batch
from coral.errors import CoralError
from coral.files import atomic_directory
from coral.target.default import TOY
from coral.target.target import Target

CHUNK = 256  # rows whose scores over the vocabulary are held at once


def shallow(target: Target, layers: int) -> PreTrainedModel:
    """A float32 model of the target's shape with so many of its layers; embedding and head are frozen."""
    settings = target.config.to_dict() | {"num_hidden_layers": layers}
    settings.pop("layer_types", None)  # one for each layer; made anew
    config = type(target.config).from_dict(settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    deep = target.config.num_hidden_layers - 1
    copied = {round(i * deep / max(1, layers - 1)): i for i in range(layers)}
    weights = {}
    for name, value in target.model.state_dict().items():
        before, found, after = name.partition(".layers.")
        if found:
            number, _, rest = after.partition(".")
            if int(number) not in copied:
                continue
            name = f"{before}.layers.{copied[int(number)]}.{rest}"
        weights[name] = value.float()
    model.load_state_dict(weights)
    model.get_input_embeddings().requires_grad_(False)
    model.get_output_embeddings().requires_grad_(False)
    return model


def features(model: PreTrainedModel, batch: FeatureBatch) -> Tensor:
    """What enters the LM head, [B,L,h]; packed documents do not see each other."""
    ids, starts = batch.input_ids, batch.document_starts
    if starts is None:
        return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    first = torch.where(starts, positions, 0).cummax(-1).values
    mask = (first[:, :, None] == first[:, None]) & (positions[:, :, None] >= positions[:, None])
    decoder = model.get_decoder()
    return decoder(
        input_ids=ids, attention_mask=mask[:, None], position_ids=positions - first, use_cache=False
    ).last_hidden_state


@torch.no_grad()
def distil(wanted: Tensor, made: Tensor, head: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compare features [N,h] of the target and the draft model under the frozen LM head [V,h].

    Returns:
        For each row the divergence of the two distributions [N], its gradient by `made` [N,h] (written out:
        autograd would keep the scores of every chunk), and whether both have the same likeliest token [N].
    """
    losses, gradients, agreed = [], [], []
    for p_rows, q_rows in zip(wanted.split(CHUNK), made.split(CHUNK), strict=True):
        log_p, log_q = (linear(rows, head).log_softmax(-1) for rows in (p_rows, q_rows))
        agreed.append(log_p.argmax(-1) == log_q.argmax(-1))
        p = log_p.exp()
        losses.append((p * (log_p - log_q)).sum(-1))
        gradients.append((log_q.exp_() - p) @ head)
    return torch.cat(losses), torch.cat(gradients), torch.cat(agreed)


def written(batch: FeatureBatch) -> Tensor:
    """Bool [B,L]: rows whose next token the target wrote."""
    return torch.cat([batch.loss_mask[:, 1:], torch.zeros_like(batch.loss_mask[:, :1])], 1)


@torch.no_grad()
def held_out(model: PreTrainedModel, target: Target, dataset: Rows, rows: list[int]) -> tuple[float, float]:
    """Mean divergence and top-1 agreement over all tokens that the target wrote in these rows."""
    losses, agreed = [], []
    for begin in range(0, len(rows), 4):
        batch = feature_batch(target, dataset, rows[begin : begin + 4])
        mask = written(batch)
        loss, _, same = distil(batch.features[mask], features(model, batch)[mask], target.head_weight)
        losses.append(loss)
        agreed.append(same)
    return float(torch.cat(losses).mean()), float(torch.cat(agreed).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", help="what `coral data prepare` or `coral data features` wrote")
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--minutes", type=float, default=20.0, help="of training; the schedule ends with them"
    )
    parser.add_argument("--target", default=str(TOY / "target"))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=2, help="rows of the data in an update")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--held-out", type=int, default=60, help="rows kept for the measurement at the end")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    target = Target.load(given.target, dtype="float32")
    data = prepared.load(given.data)
    prepared.check(data.info, target.vocab_size, target.tokenizer)
    if target.head_bias is not None or not 1 <= given.layers < target.config.num_hidden_layers:
        raise CoralError("the target must have an LM head without bias and more layers than --layers.")
    if len(data.dataset) < given.held_out + given.batch_size:
        raise CoralError(f"{given.data} holds only {len(data.dataset)} rows; lower --held-out.")
    model = shallow(target, given.layers)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, given.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)

    order = torch.randperm(len(data.dataset)).tolist()
    aside, rows = order[: given.held_out], order[given.held_out :]
    begin, update, tokens, at = perf_counter(), 0, 0, 0
    recent: list[tuple[float, float]] = []
    while (done := (perf_counter() - begin) / (60 * given.minutes)) < 1:
        if at + given.batch_size > len(rows):
            rows, at = [rows[i] for i in torch.randperm(len(rows)).tolist()], 0
        batch = feature_batch(target, data.dataset, rows[at : at + given.batch_size])
        at, mask = at + given.batch_size, written(batch)
        if not mask.any():
            continue
        made = features(model, batch)[mask]
        losses, gradients, same = distil(batch.features[mask], made.detach(), target.head_weight)
        made.backward(gradients / len(gradients))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        warm_up, cosine = min(1.0, (update + 1) / 20), 0.5 * (1 + math.cos(math.pi * done))
        for group in optimiser.param_groups:
            group["lr"] = given.learning_rate * warm_up * cosine
        optimiser.step()
        optimiser.zero_grad()
        update, tokens = update + 1, tokens + len(losses)
        recent.append((float(losses.mean()), float(same.float().mean())))
        if update % 50 == 0:
            loss, agreement = (sum(values) / len(recent) for values in zip(*recent, strict=True))
            recent.clear()
            print(
                f"update {update}, {done:.0%}: divergence {loss:.3f}, same likeliest token {agreement:.1%}, "
                f"{tokens / (perf_counter() - begin):.0f} tokens/s",
                flush=True,
            )
    loss, agreement = held_out(model, target, data.dataset, aside)
    with atomic_directory(given.output) as directory:
        model.save_pretrained(directory)
        if target.tokenizer is not None:
            target.tokenizer.save_pretrained(directory)
    print(
        f"{given.output}: {update} updates, {tokens} tokens; on {len(aside)} held-out rows "
        f"divergence {loss:.3f}, same likeliest token {agreement:.1%}"
    )


if __name__ == "__main__":
    main()

"""What a verification's products and attention cost: `python benchmarks/few_rows.py OUTPUT`.

The products of one forward of the shipped target, deepened to 32 layers (346 MiB of float32 weights), and
the attention of its layers over 400 rows, by number of rows: torch, MKL's packed weights, `native.few_rows`
with weights packed as float32 and as bfloat16, and with bfloat16 rows. Each finds the caches as a whole
forward leaves them; they take turns, so that a slow moment of the machine hits all. Beside them stands the
floor: reading the weights once at the bandwidth of summing a large tensor.
Writes OUTPUT/results.json and OUTPUT/results.md. A minute on a quiet machine.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from cycle import bandwidth
from publish import header, show
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from coral.bench.deepen import deepen
from coral.cli.options import quiet_transformers
from coral.native import few_rows
from coral.native.memory import keep_freed_memory
from coral.target.default import TOY
from coral.target.target import Target

ROWS = (1, 4, 8, 12, 16, 32)
KEYS, QUERY_HEADS, KEY_HEADS, HEAD_SIZE = 400, 4, 2, 64
mkl: Any = torch.ops.mkl
Calls = dict[tuple[int, str], Callable[[], None]]  # by rows and who multiplies


def weights() -> list[Tensor]:
    """Those of one forward, as a compiled one joins them."""
    model = deepened().model
    joined = []
    for layer in model.get_decoder().layers:
        a, mlp = layer.self_attn, layer.mlp
        joined.append(torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]))
        joined += [
            a.o_proj.weight,
            torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            mlp.down_proj.weight,
        ]
    return [weight.detach().clone() for weight in [*joined, model.get_output_embeddings().weight]]


def deepened() -> Target:
    target = Target.load(TOY / "target", dtype="float32")
    deepen(target.model, 32)
    return target


def products(matrices: list[Tensor]) -> Calls:
    halves = [matrix.bfloat16() for matrix in matrices]
    theirs = [mkl._mkl_reorder_linear_weight(matrix, max(ROWS)) for matrix in matrices]
    ours = [few_rows.pack(matrix) for matrix in beyond_bfloat16(matrices)]
    our_halves = [few_rows.pack(half) for half in halves]

    def each(
        rows: int,
        dtype: torch.dtype,
        multiply: Callable[[Tensor, Tensor, Tensor], Tensor],
        packed: list[Tensor],
    ) -> None:
        inputs = {width: torch.ones(rows, width, dtype=dtype) for width in {m.shape[1] for m in matrices}}
        for matrix, form in zip(matrices, packed, strict=True):
            multiply(inputs[matrix.shape[1]], matrix, form)

    def own(x: Tensor, matrix: Tensor, packed: Tensor) -> Tensor:
        return torch.ops.coral.linear(x, packed, None, len(matrix))

    ways: dict[str, tuple[torch.dtype, Any, list[Tensor]]] = {
        "torch": (torch.float32, lambda x, matrix, _: linear(x, matrix), matrices),
        "MKL, packed": (
            torch.float32,
            lambda x, matrix, p: mkl._mkl_linear(x, p, matrix, None, len(x)),
            theirs,
        ),
        "coral": (torch.float32, own, ours),
        "coral, bfloat16 weights": (torch.float32, own, our_halves),
        "torch, bfloat16": (torch.bfloat16, lambda x, _, half: linear(x, half), halves),
        "coral, bfloat16": (torch.bfloat16, own, our_halves),
    }
    return {(rows, name): partial(each, rows, *way) for rows in ROWS for name, way in ways.items()}


def beyond_bfloat16(matrices: list[Tensor]) -> list[Tensor]:
    """The same with one weight each that bfloat16 cannot hold, so that they are packed as float32."""
    changed = [matrix.clone() for matrix in matrices]
    for matrix in changed:
        matrix[0, 0] = 1 + 2**-20
    return changed


def attention() -> Calls:
    calls: Calls = {}
    for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, ", bfloat16")):
        caches = [torch.randn(2, 1, KEY_HEADS, KEYS, HEAD_SIZE).to(dtype) for _ in range(32)]
        for rows in ROWS:
            q = torch.randn(1, rows, QUERY_HEADS, HEAD_SIZE).to(dtype).transpose(1, 2)
            mask = torch.ones(1, 1, rows, KEYS, dtype=torch.bool).tril(KEYS - rows)

            def each(
                attend: Callable[[Tensor, Tensor, Tensor], Tensor],
                q: Tensor = q,
                caches: list[Tensor] = caches,
            ) -> None:
                for k, v in caches:
                    attend(q, k, v)

            theirs = partial(scaled_dot_product_attention, attn_mask=mask, enable_gqa=True)
            calls[rows, f"torch{suffix}"] = partial(each, theirs)
            own = partial(few_rows.attend, mask=mask, scale=HEAD_SIZE**-0.5)
            calls[rows, f"coral{suffix}"] = partial(each, own)
    return calls


def in_turn(calls: Calls, repeats: int) -> dict[int, dict[str, float]]:
    """Median seconds of each."""
    times = defaultdict[tuple[int, str], list[float]](list)
    for _ in range(repeats):
        for key, call in calls.items():
            begin = perf_counter()
            call()
            times[key].append(perf_counter() - begin)
    seconds: dict[int, dict[str, float]] = {rows: {} for rows in ROWS}
    for (rows, name), measured in times.items():
        seconds[rows][name] = median(measured[1:])
    return seconds


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    keep_freed_memory()
    quiet_transformers()
    assert few_rows.load()
    matrices = weights()
    size, speed = sum(matrix.nbytes for matrix in matrices), bandwidth()
    results = {
        **header(),
        "bytes": size,
        "bandwidth": speed,
        "products": in_turn(products(matrices), options.repeats),
        "attention": in_turn(attention(), options.repeats),
    }
    lines = []
    for part in ("products", "attention"):
        names = [*results[part][1]]
        lines += [f"| {part} of one forward, ms | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
        for rows, seconds in results[part].items():
            cells = (f"{1000 * seconds[n]:.1f} ({seconds[n] / results[part][1][n]:.2f})" for n in names)
            lines.append(f"| {rows} row{'s' * (rows > 1)} | {' | '.join(cells)} |")
        lines.append("")
    lines += [
        f"In brackets: over one row. Floor of the products at {speed / 1e9:.1f} GB/s: {size / 2**20:.0f} MiB "
        f"of float32 weights take {1000 * size / speed:.1f} ms, as bfloat16 {500 * size / speed:.1f} ms.",
    ]
    show(options.output, results, lines)


if __name__ == "__main__":
    main()

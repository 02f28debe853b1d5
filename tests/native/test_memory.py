"""What training holds does not grow with the number of shapes it has met; weights that share memory."""

import os
import subprocess
import sys
from itertools import product

import pytest
import torch

from coral.device import CPU, has_fast_bfloat16
from coral.native.memory import weights_like

# Products of ever new shapes, as batches of joined rows have; prints the resident MiB after 80 and after 200.
SCRIPT = """
import psutil, torch
import coral
from coral.native.memory import keep_freed_memory, trim
keep_freed_memory()
torch.set_num_threads(1)
weight = torch.randn(1536, 576).bfloat16().requires_grad_()
for n in range(1, 201):
    rows = torch.randn(400 + n * 77 % 200, 576).bfloat16().requires_grad_()
    torch.nn.functional.linear(rows, weight).float().pow(2).mean().backward()
    weight.grad = None
    if n % 10 == 0:
        trim()
    if n in (80, 200):
        print(psutil.Process().memory_info().rss >> 20)
"""


@pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and has_fast_bfloat16(CPU)),
    reason="products in bfloat16 are not oneDNN's here",
)
def test_memory_is_flat_over_products_of_new_shapes() -> None:
    """Stops oneDNN's cache of a thousand products, which let training grow by gigabytes."""
    unset = {k: v for k, v in os.environ.items() if not k.endswith("CACHE_CAPACITY")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=unset, check=True
    )
    earlier, later = map(int, done.stdout.split())
    assert later < 1.1 * earlier, done.stdout


def test_weights_in_shared_memory_lie_apart() -> None:
    """Stops weights that overwrite each other, where small ones share a piece of memory."""
    shapes = [(3, 5), (1,), (700, 33), (0, 4), (17_000, 1024), (2, 2)]
    made = [
        weights_like(torch.empty(shape, dtype=dtype)).fill_(index)
        for index, (shape, dtype) in enumerate(product(shapes, (torch.float32, torch.bfloat16)))
    ]
    for index, weights in enumerate(made):
        assert weights.shape == shapes[index // 2] and weights.is_contiguous()
        assert (weights == index).all() and weights.data_ptr() % 16 == 0

"""The kernel of the routed head against its PyTorch twin, in Triton's interpreter and through its compiler.

Both run in processes of their own: whether a kernel is interpreted is settled when triton is imported.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

INTERPRETED = """
import torch
from triton.runtime import interpreter
from coral.gpu.kernels import group_logits, group_logits_slowly

dot = interpreter.InterpreterBuilder.create_dot

def with_values(builder, *factors_and_more):  # triton 3.9 multiplies the bits of bfloat16, taken as integers
    a, b, *more = factors_and_more
    if a.dtype == b.dtype == interpreter.tl.bfloat16:
        a, b = (builder.cast_impl(x, interpreter.tl.float32) for x in (a, b))
    return dot(builder, a, b, *more)

interpreter.InterpreterBuilder.create_dot = with_values
torch.manual_seed(0)
cases = [  # N, G, R, h: whole blocks, one row, ragged on all sides, more rows than a block, no rows
    (4, 5, 64, 128), (1, 3, 1, 1), (9, 6, 70, 130), (67, 3, 17, 19), (0, 3, 8, 8),
]
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for i, (n, g, r, h) in enumerate(cases):
        weight, features = torch.randn(g, r, h).to(dtype), torch.randn(n, h).to(dtype)
        chosen = torch.tensor([g - 1, 0][: 1 + i % 2])
        absent = torch.randn(g, r).masked_fill(torch.rand(g, r) < 0.1, float("-inf")).to(dtype)
        for bias in (None, absent):
            found = group_logits(weight, bias, features, chosen)
            expected = group_logits_slowly(weight, bias, features, chosen)
            assert found.dtype == torch.float32 and found.shape == (n, len(chosen) * r)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
"""

# For an H100 with whole blocks, for an A100 with a ragged width; no GPU is needed for this.
COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from coral.gpu.kernels import _group_logits as kernel, blocks

names = kernel.arg_names
place = {name: (names.index(name),) for name in names}
for capability, kind, size, even in ((90, "bf16", 2, True), (80, "fp32", 4, False)):
    block = blocks(64, size)
    constants = {"HAS_BIAS": True, **block}
    types = dict.fromkeys(names, "i32")
    types |= dict.fromkeys(("weight", "bias", "features"), "*" + kind) | dict.fromkeys(constants, "constexpr")
    types |= {"chosen": "*i64", "logits": "*fp32"}
    whole = ("weight", "features", "size", "width") if even else ("weight", "features")
    source = ASTSource(
        kernel, types, {place[name]: value for name, value in constants.items()},
        {place[name]: [["tt.divisibility", 16]] for name in whole},
    )
    options = {"num_warps": 4, "num_stages": 4, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.metadata.shared <= {90: 227, 80: 99}[capability] * 1024  # 99 KiB: also on an RTX card
    if even:
        assert "cp.async" in compiled.asm["ptx"] and "wgmma" in compiled.asm["ptx"]
"""


def run(program: str, **variables: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", **variables}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_interpreted_kernel_agrees_with_its_twin():
    """Stops another group's rows or bias, values from beyond an edge, and sums in a short format."""
    run(INTERPRETED, TRITON_INTERPRET="1")


def test_kernel_compiles_for_gpus(tmp_path):
    """Stops what the interpreter accepts and the compiler does not, and blocks that a GPU has no room for."""
    run(COMPILED, TRITON_CACHE_DIR=str(tmp_path))

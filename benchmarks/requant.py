"""A GGUF file at another precision: `python benchmarks/requant.py IN.gguf OUT.gguf BF16`.

Every matrix is dequantised and written again as F32, F16, BF16, Q8_0, Q5_0, Q4_1 or Q4_0, whatever it was;
one whose rows are no whole number of blocks is written as BF16. Vectors and metadata stay as they are. BF16
holds what the dequantised weights round to, so it is the model that `coral` runs in bfloat16. Without OUT the
precision of IN is printed. Needs gguf, not coral; one matrix in float32 is held at a time.
"""

import argparse
import math
import os
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quant_shape_to_byte_shape, quantize

PRECISIONS = ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_1", "Q4_0")
_AS_ARRAY = {"F32": np.float32, "F16": np.float16}  # what numpy knows; the rest is written as bytes


def precision(source: Path) -> str:
    """What the file says that its weights mostly are, as Q4_1 or Q4_K_M."""
    field = GGUFReader(source).fields.get("general.file_type")
    if field is None:
        return "unknown"
    return LlamaFileType(int(field.contents())).name.removeprefix("ALL_").removeprefix("MOSTLY_")


def file_type(wanted: str) -> LlamaFileType:
    return LlamaFileType[f"{'ALL' if wanted == 'F32' else 'MOSTLY'}_{wanted}"]


def requant(source: Path, output: Path, wanted: str) -> None:
    """Write `source` with its matrices as `wanted`, aside first, then renamed.

    Raises:
        KeyError: `wanted` is none of PRECISIONS.
    """
    reader = GGUFReader(source)
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    writer = GGUFWriter(partial, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            element = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=element)
    writer.add_file_type(file_type(wanted))
    kinds = []
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        kind = tensor.tensor_type if len(shape) == 1 else GGMLQuantizationType[wanted]
        block, size = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            kind = GGMLQuantizationType.BF16
            block, size = GGML_QUANT_SIZES[kind]
        kinds.append(kind)
        dtype = _AS_ARRAY.get(kind.name)
        of_array = np.dtype(dtype or np.uint8)
        stored = shape if dtype else quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(tensor.name, stored, of_array, math.prod(shape) // block * size, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, kind in zip(reader.tensors, kinds, strict=True):
            data = tensor.data
            if kind != tensor.tensor_type:
                shape = [int(size) for size in reversed(tensor.shape)]
                values = dequantize(data, tensor.tensor_type).astype(np.float32, copy=False).reshape(shape)
                data = quantize(values, kind)
            writer.write_tensor_data(np.array(data))
        writer.close()
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("precision", nargs="?", choices=PRECISIONS)
    options = parser.parse_args()
    if options.output is None:
        print(precision(options.source))
        return 0
    if options.precision is None:
        parser.error(f"say which precision is wanted: {', '.join(PRECISIONS)}")
    requant(options.source, options.output, options.precision)
    return 0


if __name__ == "__main__":
    sys.exit(main())

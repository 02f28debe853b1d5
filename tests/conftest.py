"""One thread: tiny matrices run several times slower when four threads fight over them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

torch.set_num_threads(1)

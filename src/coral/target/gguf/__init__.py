"""Targets stored as GGUF files: named, read, converted once to a plain Hugging Face directory, and cached.

names       what --target may name: a file, a directory that holds one, ORG/REPO:QUANT on the hub
file        metadata and tensors as they lie in the file
config      metadata -> config.json and generation_config.json; `rope` its rotary part
tokenizer   metadata -> tokenizer.json and the chat template
weights     tensors -> model.safetensors, a few rows at a time
convert     all of these -> a directory, which `cache` keeps
"""

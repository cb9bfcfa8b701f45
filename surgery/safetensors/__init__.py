"""Safetensors files: checked before they are read, read tensor by tensor, written so that tensors begin aligned."""

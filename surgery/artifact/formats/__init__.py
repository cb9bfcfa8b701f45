"""Formats of exports besides plain weights and artifacts, a file each.

checkpoint          what folders of transformers have in common
transformers        codes that transformers decodes while it loads them, where `surgery` is imported
compressed_tensors  linear layers as compressed-tensors' packed integers, which servers run as they are
lora                a member of a family as a base and an adapter of peft
"""

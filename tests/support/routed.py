"""A small BERT whose layers are routed, alone or beside another one, and runs that train it."""

import torch
import transformers

import surgery
from surgery.training.tasks.streams import Batches

IDS = torch.randint(5, 60, (3, 7), generator=torch.Generator().manual_seed(0))
CONFIG = {"steps": 3, "burn_in": 1, "generations": 2, "final": 1, "optimizer": {"lr": 0.003},
          "evolution": {"change": "none", "codes": "ones", "start": "given"}}  # fmt: skip


def bert(seed=0, layers=4, dropout=0.0):
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.BertModel(config).eval()


def member(module=None, name="text", inputs=IDS):
    return surgery.load_member(module or bert(), name=name, inputs=inputs)


def joined(settings=None, module=None, name="text", inputs=IDS):
    one = member(module, name, inputs)
    return surgery.join([one], surgery.plan_modules([one], "routes", settings))


def run(module, x=IDS):
    with torch.no_grad():
        found = module(x)
    return getattr(found, "last_hidden_state", found)


def distilled(name="text", member=None):
    return surgery.Task(name, member or name, Batches(IDS, IDS, 3), {"distillation": 1.0})


def train(joint, *tasks, **config):
    return surgery.train(joint, tasks or [distilled()], {**CONFIG, **config}, cpu=True)


def by_hand(*order):
    return {"routing": "permuted", "orders": {"text": {"": order}}}

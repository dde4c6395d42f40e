"""A small data set and a tiny language model with all folders that training needs, made for a test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from raw_data import random_interactions, write_ml_100k
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rellax.ctr.config import CRMConfig, TrainConfig
from rellax.ctr.crm import train_crm
from rellax.ctr.dataset import Dataset
from rellax.ctr.prepare import prepare
from rellax.ctr.retrieval import retrieve
from rellax.ctr.sources import read_ml_100k
from rellax.subr import save_embeddings

USERS, ITEMS, PER_USER = 12, 40, 15
GATED: dict[str, Any] = {"interaction": "full", "soft_prompt": True}  # all that stages 2 and joint can have


@dataclass(frozen=True)
class Workspace:
    """Paths of the folders in `root`."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def crm(self) -> Path:
        return self.root / "crm"

    @property
    def embeddings(self) -> Path:
        return self.root / "embeddings"

    @property
    def retrieved(self) -> Path:
        return self.root / "retrieved"

    def config(self, **changes: Any) -> TrainConfig:
        """A quick training run; `changes` replaces fields."""
        values: dict[str, Any] = {
            "data": str(self.data),
            "model": str(self.model),
            "crm": str(self.crm),
            "retrieved": str(self.retrieved),
            "r": 2,
            "alpha": 4,
            "k": 3,
            "shots": 10,
            "epochs": 2,
            "batch_size": 4,
            "micro_batch_size": 3,
            "validation_samples": None,
            "checkpoint_every": 2,
            "dtype": "float32",
            "lr": 0.02,
        }
        return TrainConfig(**values | changes)


def make_workspace(root: Path) -> Workspace:
    workspace = Workspace(root)
    raw = write_ml_100k(root / "raw", random_interactions(USERS, ITEMS, PER_USER, seed=0), USERS, ITEMS)
    prepare(read_ml_100k(raw), workspace.data)
    dataset = Dataset.load(workspace.data)
    make_model(workspace.model, dataset)
    train_crm(dataset, workspace.crm, CRMConfig(embedding_dim=4, hidden=(8, 6), epochs=1, max_len=6))
    vectors = F.normalize(torch.randn(ITEMS, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    save_embeddings(workspace.embeddings, vectors, dataset.items["item_id"].to_pylist(), "random")
    retrieve(
        {"data": str(workspace.data), "embeddings": str(workspace.embeddings), "k": 4}, workspace.retrieved
    )
    return workspace


def make_model(folder: Path, dataset: Dataset, *, hidden_size: int = 16) -> None:
    """A random Llama, and a byte-pair tokenizer that was trained on the titles."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*dataset.texts, *(["Answer Yes. Answer No."] * 20)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 3 // 2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=tokenizer.token_to_id("<end>"),
        bos_token_id=None,
        initializer_range=0.2,  # large enough for predictions that differ
    )
    LlamaForCausalLM(config).save_pretrained(folder)

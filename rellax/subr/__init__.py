"""Semantic user behaviour retrieval (ReLLa's SUBR): item texts, embeddings, PCA, nearest behaviours."""

from rellax.subr.embed import check_lengths, embed_items, token_lengths
from rellax.subr.files import (
    Retrieved,
    check_embeddings,
    load_embeddings,
    load_item_ids,
    read_retrieved,
    retrieved_block,
    retrieved_k,
    retrieved_schema,
    retrieved_table,
    save_embeddings,
    write_retrieved,
)
from rellax.subr.neighbours import Neighbours, item_neighbours
from rellax.subr.pca import PCA, pca
from rellax.subr.retrieve import history_keys, retrieve, user_keys

__all__ = [
    "PCA",
    "Neighbours",
    "Retrieved",
    "check_embeddings",
    "check_lengths",
    "embed_items",
    "history_keys",
    "item_neighbours",
    "load_embeddings",
    "load_item_ids",
    "pca",
    "read_retrieved",
    "retrieve",
    "retrieved_block",
    "retrieved_k",
    "retrieved_schema",
    "retrieved_table",
    "save_embeddings",
    "token_lengths",
    "user_keys",
    "write_retrieved",
]

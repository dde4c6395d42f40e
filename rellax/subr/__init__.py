"""Semantic user behaviour retrieval (ReLLa's SUBR): item texts, embeddings, PCA, nearest behaviours."""

from rellax.subr.embed import embed_items
from rellax.subr.files import Retrieved, load_embeddings, read_retrieved, save_embeddings, write_retrieved
from rellax.subr.neighbours import Neighbours, item_neighbours
from rellax.subr.pca import PCA, pca
from rellax.subr.retrieve import retrieve

__all__ = [
    "PCA",
    "Neighbours",
    "Retrieved",
    "embed_items",
    "item_neighbours",
    "load_embeddings",
    "pca",
    "read_retrieved",
    "retrieve",
    "save_embeddings",
    "write_retrieved",
]

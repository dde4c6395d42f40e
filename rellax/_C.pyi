"""The C++ extension, built from csrc/ by scikit-build-core."""

def isa() -> str: ...
def supported_isas() -> list[str]: ...
def history_topk(
    *,
    embeddings: int,
    dtype: str,
    dim: int,
    items: int,
    offsets: int,
    target: int,
    user: int,
    end: int,
    queries: int,
    k: int,
    positions: int,
    scores: int,
    threads: int,
) -> None: ...

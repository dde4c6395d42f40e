"""The C++ extension, built from csrc/ by scikit-build-core."""

def isa() -> str: ...
def supported_isas() -> list[str]: ...

class Dropout:
    def __init__(
        self, *, column: int = 0, seed: int = 0, threshold: int = 0, factor: float = 1.0
    ) -> None: ...

def cflora_forward(
    *,
    dtype: str,
    r: int,
    d_from: int,
    d_to: int,
    from_: int,
    from_stride: int,
    down: int,
    up: int,
    gate: int,
    scale: float,
    dropout: Dropout,
    to: int,
    h: int,
    offsets: int,
    instances: int,
    threads: int,
) -> None: ...
def cflora_backward(
    *,
    dtype: str,
    r: int,
    d_from: int,
    d_to: int,
    from_: int,
    from_stride: int,
    down: int,
    up: int,
    gate: int,
    scale: float,
    dropout: Dropout,
    to: int,
    h: int,
    dh: int,
    z: int,
    dgate: int,
    offsets: int,
    instances: int,
    threads: int,
) -> None: ...
def cflora_outer(
    *,
    dtype: str,
    tokens: int,
    r: int,
    d: int,
    left: int,
    right: int,
    right_stride: int,
    dropout: Dropout,
    out: int,
    threads: int,
) -> None: ...
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

"""Two processes give the gradients of one on the whole batch, Trainer takes the steps of a plain loop."""

from __future__ import annotations

import itertools
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_patch import CHECKPOINTS, close, set_checkpointing
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

RANKS = 2


def _whole_batch() -> list[tiny.Instance]:
    return tiny.instances(seed=3)[:2] + tiny.instances(seed=4)[:2]


def _model(kind: str) -> Any:
    model = tiny.patched(tiny.base_model())
    set_checkpointing(model, kind)
    return model


def _rank(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    share = tiny.batch(_whole_batch()[2 * rank : 2 * rank + 2])
    for wrap, kind in itertools.product((_ddp, _fsdp), CHECKPOINTS):
        model = _model(kind)
        parallel = wrap(model)
        for _ in range(2):  # DDP's second backward pass runs with its buckets rebuilt
            model.zero_grad()  # before the forward pass: within it FSDP swaps the parameters
            gradients = tiny.gradients(model, parallel(**share).loss)
        whole = {name: g.full_tensor() if wrap is _fsdp else g for name, g in gradients.items()}
        torch.save(whole, Path(folder) / f"{wrap.__name__}-{kind}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _ddp(model: Any) -> Any:
    return DistributedDataParallel(model)


def _fsdp(model: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def test_two_ranks_give_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, args=(port, str(tmp_path)), nprocs=RANKS)
    model = _model("none")
    expected = tiny.gradients(model, model(**tiny.batch(_whole_batch())).loss)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2 * len(CHECKPOINTS) * RANKS
    for file in files:
        close(torch.load(file, weights_only=True), expected)


class Prompts(torch.utils.data.Dataset):
    """Single instances; Trainer keeps the columns that the model's forward takes, the collator pads."""

    def __init__(self, made: list[tiny.Instance]) -> None:
        self.made = made

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, index: int) -> dict[str, Any]:
        one = self.made[index]
        return {"input_ids": one.tokens, "item_ids": one.items, "instance_embed": one.embed, "labels": 0}


def _collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return tiny.batch(
        [tiny.Instance(row["input_ids"], row["item_ids"], row["instance_embed"]) for row in rows]
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_takes_the_steps_of_a_plain_loop(tmp_path: Path, checkpointing: bool) -> None:
    made = [one for seed in range(4) for one in tiny.instances(seed=seed)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_steps=3,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        max_grad_norm=0.0,
        weight_decay=0.0,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": True} if checkpointing else None,
    )
    model = tiny.patched(tiny.base_model())
    trainer = Trainer(model, arguments, data_collator=_collate, train_dataset=Prompts(made))
    trainer.train()

    plain = tiny.patched(tiny.base_model())
    optimizer = torch.optim.AdamW(tiny.trainable(plain).values(), lr=1e-2, weight_decay=0.0)
    for step in (0, 6, 0):
        optimizer.zero_grad()
        plain(**tiny.batch(made[step : step + 6])).loss.backward()
        optimizer.step()
    close(tiny.trainable(model), tiny.trainable(plain))
    prediction = trainer.predict(Prompts(made))  # in batches of 8
    plain.eval()
    expected = torch.cat([plain(**tiny.batch(made[i : i + 8])).answer_logits for i in (0, 8)])
    close(torch.from_numpy(prediction.predictions), expected)

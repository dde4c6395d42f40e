"""DeepFM over a user's features, the target item and the mean of the behaviours.

Put together from FuxiCTR's layers, because its wheel has no DeepFM that reads sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FeatureEmbedding, InnerProductInteraction, MaskedAveragePooling, MLP_Block
from fuxictr.pytorch.models import BaseModel
from torch import Tensor, nn

_Inputs = tuple[dict[str, Tensor], dict[str, Tensor], Tensor]


class DeepFM(BaseModel):
    """DeepFM (Guo et al., IJCAI 2017): sigmoid of a factorization machine plus an MLP on the same embeddings.

    Fields are the user's features, the target's, and the same of the behaviours, averaged.
    """

    def __init__(
        self,
        feature_map: FeatureMap,
        *,
        gpu: int,
        embedding_dim: int,
        dnn_hidden_units: list[int],
        net_dropout: float,
        embedding_regularizer: float,
        learning_rate: float,
        optimizer: str,
        loss: str,
        **others: Any,
    ) -> None:
        super().__init__(
            feature_map, "DeepFM", gpu=gpu, embedding_regularizer=embedding_regularizer, **others
        )
        sources = [spec["source"] for spec in feature_map.features.values()]
        fields = len(sources) + sources.count("item")
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.linear = FeatureEmbedding(feature_map, 1)
        self.bias = nn.Parameter(torch.zeros(1))
        self.average = MaskedAveragePooling()
        self.interaction = InnerProductInteraction(fields)
        self.dnn = MLP_Block(
            input_dim=fields * embedding_dim,
            output_dim=1,
            hidden_units=dnn_hidden_units,
            dropout_rates=net_dropout,
        )
        self.compile(optimizer, loss, learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: _Inputs) -> dict[str, Tensor]:
        fields = self._fields(self.embedding_layer, inputs)
        first_order = self._fields(self.linear, inputs).sum(dim=1) + self.bias
        logit = first_order + self.interaction(fields) + self.dnn(fields.flatten(1))
        return {"y_pred": self.output_activation(logit)}

    def _fields(self, embedding: FeatureEmbedding, inputs: _Inputs) -> Tensor:
        """(B, fields, d) of user, target and behaviours."""
        users, items, mask = inputs
        rows = embedding(items)
        rows = rows.view(len(mask), -1, *rows.shape[1:])  # (B, behaviours + 1, item fields, d)
        behaviours = self.average(rows[:, :-1].flatten(2), mask).view_as(rows[:, -1])
        parts = [rows[:, -1], behaviours]
        return torch.cat([embedding(users), *parts] if users else parts, dim=1)

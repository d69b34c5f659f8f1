"""A small decoder-only transformer in plain torch, with its initialisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention


class Transformer(nn.Module):
    """Predicts the next of some tokens: 135,808 parameters for bytes in windows of 64.

    Embeddings of tokens and positions, `depth` blocks that normalise before each part (Xiong et al. 2020,
    arXiv 2002.04745), a last normalisation and the outputs, whose weights are their own. Input `(n, length)`
    with at most `context` tokens, output logits `(n, length, vocabulary)`. No dropout, no biases but those of
    the normalisations.

    >>> import torch
    >>> net = Transformer()
    >>> net(torch.zeros(2, 10, dtype=torch.int64)).shape, sum(p.numel() for p in net.parameters())
    (torch.Size([2, 10, 256]), 135808)
    """

    def __init__(
        self,
        vocabulary: int = 256,
        context: int = 64,
        *,
        width: int = 64,
        depth: int = 2,
        heads: int = 2,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, vocabulary, bias=False)
        _initialise(self, depth)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the token after each."""
        positions = self.positions.weight[: tokens.shape[1]]
        features = self.blocks(self.tokens(tokens) + positions)
        logits: Tensor = self.output(self.norm(features))
        return logits


class _Block(nn.Module):
    """Attention to what came before, then a hidden layer of four times the width; each is added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.hidden = nn.Linear(width, 4 * width, bias=False)
        self.back = nn.Linear(4 * width, width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """The features with both parts added."""
        features = features + self._attention(self.norm1(features))
        added: Tensor = self.back(gelu(self.hidden(self.norm2(features))))
        return features + added

    def _attention(self, features: Tensor) -> Tensor:
        n, length, width = features.shape
        heads = self.query_key_value(features).view(n, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        found = scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed: Tensor = self.mix(found.transpose(1, 2).reshape(n, length, width))
        return mixed


def _initialise(model: Transformer, depth: int) -> None:
    """As GPT-2 (Radford et al. 2019): 0.02, and less where parts are added, by their number."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            added = name.endswith(("mix.weight", "back.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if added else 0.02)


TRANSFORMERS: dict[str, Callable[..., nn.Module]] = {
    "transformer": Transformer,
    "transformer-4x256": partial(Transformer, width=256, depth=4, heads=4),
}
"""By the name in a recipe."""

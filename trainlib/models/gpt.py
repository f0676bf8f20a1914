"""The language model: a decoder over tokens."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from trainlib.losses import IGNORED

# Faster by a third than torch's own choice (16 rows for a width of 256 and 32,000 tokens), for
# 32 MB of logits at a time instead of 2.
_ROWS_AT_A_TIME = 256
# Logits that are held whole, 64 MB of them: chunks take a small GPT 5 % longer.
_WHOLE_LOGITS = 2**24


class GPT(nn.Module):
    """Pre-norm blocks of causal attention with rotary positions, and a tied embedding.

    Args:
        vocab_size: number of different tokens.
        depth: blocks.
        width: channels of a token.
        heads: of the attention, each of width / heads channels.
        dropout: share of each branch's outputs set to 0 in training.

    Raises:
        ValueError: width / heads is no even whole number.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3,
    with RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), rotary positions (Su et al. 2021,
    arXiv:2104.09864) and no biases.
    """

    def __init__(
        self, vocab_size: int, depth: int = 4, width: int = 128, heads: int = 4,
        dropout: float = 0.0,
    ):
        super().__init__()
        if width % (2 * heads) != 0:
            raise ValueError(f"width / heads is an even whole number, got {width} / {heads}")
        self.head_width = width // heads
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.recomputes = False
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # 2 * depth branches add up in the residual stream.
                scale = 1 / math.sqrt(2 * depth) if name.endswith("_out.weight") else 1
                nn.init.normal_(parameter, std=0.02 * scale)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass, or not."""
        self.recomputes = enable

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, hidden_only: bool = False
    ) -> Tensor | dict[str, Tensor]:
        """Logits, or what makes losses without ever holding all of them.

        Args:
            tokens: [batch, length] int64.
            targets: [batch, length] int64, -100 where nothing is predicted.
            hidden_only: return what the logits are made of, and its matrix.

        Returns:
            Logits [batch, length, vocab_size]; with targets ``losses`` [batch, length] fp32, in
            nats, 0 where nothing is predicted; else ``hidden`` [batch, length, width] and ``head``
            [vocab_size, width], whose product the logits are.
        """
        hidden = self.embedding(tokens)
        angles = rotary_angles(tokens.shape[1], self.head_width, tokens.device)
        for block in self.blocks:
            if self.recomputes and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, angles, use_reentrant=False)
            else:
                hidden = block(hidden, angles)
        hidden = self.norm(hidden)
        if hidden_only:
            return {"hidden": hidden, "head": self.embedding.weight}
        if targets is None:
            return functional.linear(hidden, self.embedding.weight)
        losses = token_losses(hidden.flatten(0, 1), self.embedding.weight, targets.flatten())
        return {"losses": losses.view_as(targets)}


class Block(nn.Module):
    """Attention, then two layers of 4 times the width between."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(width)
        self.attention_in = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, angles: Tensor) -> Tensor:
        hidden = hidden + self.dropout(self._attend(self.attention_norm(hidden), angles))
        branch = functional.gelu(self.mlp_in(self.mlp_norm(hidden)))
        return hidden + self.dropout(self.mlp_out(branch))

    def _attend(self, hidden: Tensor, angles: Tensor) -> Tensor:
        # [batch, length, 3 * width] -> three of [batch, heads, length, head_width].
        parts = self.attention_in(hidden).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = parts.permute(2, 0, 3, 1, 4).unbind()
        attended = functional.scaled_dot_product_attention(
            rotate(queries, angles), rotate(keys, angles), values, is_causal=True
        )
        return self.attention_out(attended.transpose(1, 2).flatten(2))


def rotary_angles(length: int, head_width: int, device: torch.device | None = None) -> Tensor:
    """Cosines and sines [2, length, head_width / 2] fp32 of position * 10000^(-2i / head_width).

    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.2.
    """
    # In fp32 under autocast, too: bf16 has 8 bits, and a position of 1,000 needs 10.
    pairs = torch.arange(0, head_width, 2, device=device, dtype=torch.float32)
    frequencies = torch.exp(pairs * (-math.log(10000) / head_width))
    positions = torch.arange(length, device=device, dtype=torch.float32)
    angles = positions[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()))


def rotate(vectors: Tensor, angles: Tensor) -> Tensor:
    """Turns channels i and i + head_width / 2 of each position by that position's angle i.

    Args:
        vectors: [..., length, head_width].
        angles: of ``rotary_angles``.

    Returns:
        Of the shape and dtype of ``vectors``.
    """
    cosines, sines = angles
    first, second = vectors.chunk(2, dim=-1)
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    return torch.cat(turned, dim=-1).type_as(vectors)


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross entropies [tokens] fp32 of the logits ``hidden @ weight.T``, in nats.

    Args:
        hidden: [tokens, width].
        weight: [vocab_size, width].
        targets: [tokens] int64; the loss is 0 where it is -100.
    """
    num_tokens, width = hidden.shape
    is_large = num_tokens * len(weight) > _WHOLE_LOGITS
    # The chunks are multiplied in fp32, whatever autocast says: on a GPU that takes longer than
    # all the rest of the step.
    is_slow = hidden.is_cuda and torch.is_autocast_enabled("cuda")
    # Where torch says that chunks pay; torch 2.12 and older have none.
    if is_large and not is_slow and num_tokens >= width < len(weight) and (
            hasattr(nn, "LinearCrossEntropyOptions")):
        # In fp32 under autocast, too: the losses come out in the dtype of the input.
        return functional.linear_cross_entropy(
            hidden.float(), weight.float(), targets, reduction="none", ignore_index=IGNORED,
            options=nn.LinearCrossEntropyOptions(batch_chunk_size=_ROWS_AT_A_TIME),
        )
    logits = functional.linear(hidden, weight)
    return functional.cross_entropy(
        logits.float(), targets, reduction="none", ignore_index=IGNORED
    )

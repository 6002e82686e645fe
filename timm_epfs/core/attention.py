"""``nn.MultiheadAttention`` with fewer or narrower heads than torch's own forward allows.

torch checks that all heads of a layer together are as wide as the query. ``PrunedMultiheadAttention`` doesn't: a layer
becomes one when its heads, or its inputs, are cut.
"""
from contextlib import contextmanager
from typing import Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['PrunedMultiheadAttention', 'plain_attention', 'refresh_attention', 'without_fused_attention']


class PrunedMultiheadAttention(nn.MultiheadAttention):
    """Multi-head attention (Vaswani et al., 2017) whose heads together may be narrower than the query.

    Parameters, arguments and results are those of ``nn.MultiheadAttention``. With H heads of D dims, and queries of E
    features, ``in_proj_weight`` has the shape (3·H·D, E), and ``out_proj.weight`` (E, H·D).

    An instance is made by cutting an ``nn.MultiheadAttention``:

    >>> dense = nn.Sequential(nn.TransformerEncoderLayer(8, 4, 16, batch_first=True), nn.Linear(8, 2))
    >>> import timm_epfs
    >>> slim = timm_epfs.prune(dense, macs=0.5, example_input=torch.rand(1, 6, 8))
    >>> type(slim[0].self_attn).__name__, slim[0].self_attn.num_heads < 4
    ('PrunedMultiheadAttention', True)
    """

    # torch's encoder layers ask for this before they give the weights to a kernel that checks widths as torch does.
    _qkv_same_embed_dim = property(lambda self: False)

    def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            key_padding_mask: Optional[Tensor] = None,
            need_weights: bool = True,
            attn_mask: Optional[Tensor] = None,
            average_attn_weights: bool = True,
            is_causal: bool = False,
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """As ``nn.MultiheadAttention.forward``.

        Raises:
            ValueError: ``attn_mask`` has a mask for each head, and there are more or fewer heads.
        """
        if is_causal and attn_mask is None:
            raise ValueError('is_causal=True says what attn_mask is; give attn_mask, too')
        is_batched = query.dim() == 3
        q, k, v = self._project(query, key, value)
        if not is_batched:
            q, k, v = q[None], k[None], v[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        q, k, v = self._split(q), *self._with_extra_sources(self._split(k), self._split(v))
        is_causal = is_causal and key_padding_mask is None and not need_weights  # the mask is given otherwise
        mask = self._mask(q, k, None if is_causal else attn_mask, key_padding_mask)
        out, weights = self._attend(q, k, v, mask, need_weights, is_causal)
        out = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not is_batched:
            out, weights = out[0], None if weights is None else weights[0]
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return out, weights.mean(-3) if need_weights and average_attn_weights else weights

    def extra_repr(self) -> str:
        return f'embed_dim={self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}'

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values, each with all heads in the last dim."""
        if self.in_proj_weight is None:
            weights: Sequence[Tensor] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [F.linear(*given) for given in zip((query, key, value), weights, biases)]

    def _with_extra_sources(self, k: Tensor, v: Tensor) -> List[Tensor]:
        """Keys and values, shape (batch, heads, sources, dims), with those that are the same for all inputs."""
        if self.bias_k is not None:
            extra = (self._split(self.bias_k), self._split(self.bias_v))
            k, v = (torch.cat([x, each.expand(len(x), -1, -1, -1)], 2) for x, each in zip((k, v), extra))
        return [F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x for x in (k, v)]

    def _split(self, x: Tensor) -> Tensor:
        """(batch, length, heads · dims) → (batch, heads, length, dims)."""
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

    def _mask(
            self,
            q: Tensor,
            k: Tensor,
            attn_mask: Optional[Tensor],
            key_padding_mask: Optional[Tensor],
    ) -> Optional[Tensor]:
        """What is added to the products of queries and keys, broadcast to (batch, heads, length, sources)."""
        masks = []
        if attn_mask is not None:
            if attn_mask.dim() == 3:
                if len(attn_mask) != len(q) * self.num_heads:
                    raise ValueError(
                        f'attn_mask has {len(attn_mask)} masks for {len(q)} inputs and {self.num_heads} heads; give '
                        f'one mask for all of them, or those of the heads that are left')
                attn_mask = attn_mask.view(len(q), self.num_heads, *attn_mask.shape[1:])
            masks.append(attn_mask)
        if key_padding_mask is not None:
            masks.append(key_padding_mask[:, None, None])
        added = [
            torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -torch.inf) if mask.dtype == torch.bool else mask
            for mask in masks
        ]
        if not added:
            return None
        mask = added[0] if len(added) == 1 else added[0] + added[1]
        extra = k.shape[2] - mask.shape[-1]
        return F.pad(mask, (0, extra)) if extra else mask

    def _attend(
            self,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            mask: Optional[Tensor],
            need_weights: bool,
            is_causal: bool,
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """What each head makes, and its attention weights, if they are needed."""
        if not need_weights:
            dropout = self.dropout if self.training else 0.0
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal), None
        products = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        weights = F.dropout((products if mask is None else products + mask).softmax(-1), self.dropout, self.training)
        return weights @ v, weights


def _widths(layer: nn.MultiheadAttention) -> Tuple[int, int, int, int, int]:
    """Features of a layer's query, key and value, and of what all heads make of its queries and of its values."""
    if layer.in_proj_weight is None:
        projections = layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight
        return (*(w.shape[1] for w in projections), layer.q_proj_weight.shape[0], layer.v_proj_weight.shape[0])
    rows, width = layer.in_proj_weight.shape
    return width, width, width, rows // 3, rows // 3


def refresh_attention(layer: nn.MultiheadAttention) -> None:
    """Set a layer's widths from the shapes of its tensors, and its class to the one that runs with them.

    A subclass of the user's own keeps its class.
    """
    query, layer.kdim, layer.vdim, heads, values = _widths(layer)
    layer.embed_dim, layer.head_dim = query, heads // layer.num_heads
    if type(layer) in (nn.MultiheadAttention, PrunedMultiheadAttention):
        layer.__class__ = nn.MultiheadAttention if query == heads == values else PrunedMultiheadAttention


@contextmanager
def plain_attention(*models: nn.Module) -> Iterator[None]:
    """Inside the block, attention runs as calls that can be watched one by one, and gives the same.

    torch's ``F.multi_head_attention_forward`` hides the linear layers in it from whoever watches calls.

    Args:
        models: Models; those of their layers that are of torch's own class have another one inside the block.
    """
    layers = [m for model in models for m in model.modules() if type(m) is nn.MultiheadAttention]
    for layer in layers:
        layer.__class__ = PrunedMultiheadAttention
    try:
        with without_fused_attention():
            yield
    finally:
        for layer in layers:
            layer.__class__ = nn.MultiheadAttention


@contextmanager
def without_fused_attention() -> Iterator[None]:
    """Inside the block, torch runs no kernel that computes a whole attention or encoder layer."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)

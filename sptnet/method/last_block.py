"""The last block of a ViT whose head reads the class token only, computed for that token: [N, T, D] -> [N, 1, D].

Queries, projection and MLP are those of one token. With one query values need not be computed for all tokens either:
what a score weighs is W_v y, so W_v serves once, on the weighed sum. Where keys have neither a norm of their own nor a
rotation that depends on their place, they fold too: q . (W_k y) = (W_k^T q) . y. So does the gain g of the norm in
front, y = g z + b: q . (W_k y) is (g W_k^T q) . z and a number that all tokens share. What is left for every token, z,
has no parameter: where no gradient leads to the block's input, none of it is differentiated.

The blocks *adopt* the children of timm's instead of holding it: the state dict keeps its keys, and a sharding strategy
sees one module whose own forward runs. What has no exact shortcut here stays as timm has it.
"""

from typing import Any

import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models import beit, eva
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F


def for_class_token(block: nn.Module) -> nn.Module:
    """The same block for the class token only, where that is exact; else the block itself."""
    attn: Any = getattr(block, "attn", None)
    kinds = (type(block), type(attn))
    if kinds == (Block, Attention) and attn.gate is None:
        return ClassTokenBlock(block)
    if kinds == (beit.Block, beit.Attention) and attn.attn_drop.p == 0:
        return BeitClassTokenBlock(block)
    if kinds in ((eva.EvaBlock, eva.EvaAttention), (eva.EvaBlock, AttentionRope)) and attn.attn_drop.p == 0:
        return EvaClassTokenBlock(block)
    return block


class _Adopting(nn.Module):
    """What a block's children and parameters do, under their names."""

    attn: Any
    norm1: nn.Module
    norm2: nn.Module
    drop_path1: nn.Module
    drop_path2: nn.Module
    mlp: nn.Module

    def __init__(self, block: nn.Module):
        super().__init__()
        for name, parameter in block.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, child in block.named_children():
            self.add_module(name, child)


class ClassTokenBlock(_Adopting):
    """timm's `Block`."""

    ls1: nn.Module
    ls2: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        attn = self.attn
        token = self._by_keys(self.norm1(x)) if self._needs_keys() else self._by_tokens(x)
        token = attn.proj_drop(attn.proj(attn.norm(token)))
        token = x[:, :1] + self.drop_path1(self.ls1(token))
        return token + self.drop_path2(self.ls2(self.mlp(self.norm2(token))))

    def _needs_keys(self) -> bool:
        attn = self.attn
        return not isinstance(attn.k_norm, nn.Identity) or (self.training and attn.attn_drop.p > 0)

    def _by_tokens(self, x: Tensor) -> Tensor:
        """Attention of the first of `x` [N, T, D] to all, [N, 1, D]; the bias of the keys moves all scores alike."""
        attn = self.attn
        tokens = _Normed(self.norm1, x)
        weight, bias = attn.qkv.weight, attn.qkv.bias
        width = attn.num_heads * attn.head_dim
        query = F.linear(tokens.first(), weight[:width], None if bias is None else bias[:width])
        query = attn.q_norm(query.unflatten(1, (attn.num_heads, attn.head_dim))) * attn.scale
        return _folded(tokens, query, weight[width:], None if bias is None else bias[2 * width :])

    def _by_keys(self, y: Tensor) -> Tensor:
        """The same by keys and values of all tokens: keys that are normalised do not fold."""
        attn = self.attn
        width = attn.num_heads * attn.head_dim
        weight, bias = attn.qkv.weight, attn.qkv.bias
        query = F.linear(y[:, :1], weight[:width], None if bias is None else bias[:width])
        key_value = F.linear(y, weight[width:], None if bias is None else bias[width:])
        # [N, 1, H * d] -> [N, H, 1, d]; [N, T, 2 * H * d] -> 2 x [N, H, T, d]
        query = query.unflatten(2, (attn.num_heads, attn.head_dim)).transpose(1, 2)
        key, value = key_value.unflatten(2, (2, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
        dropout = attn.attn_drop.p if self.training else 0.0
        token = F.scaled_dot_product_attention(attn.q_norm(query), attn.k_norm(key), value, dropout_p=dropout)
        return token.transpose(1, 2).flatten(2)


class _WithGammas(_Adopting):
    """Layer scales are parameters of the block itself, or None."""

    gamma_1: Tensor | None
    gamma_2: Tensor | None

    def __init__(self, block: nn.Module):
        super().__init__(block)
        for name in ("gamma_1", "gamma_2"):
            if name not in self._parameters:
                setattr(self, name, None)

    def _behind_attention(self, x: Tensor, token: Tensor) -> Tensor:
        """The block's output, of its input [N, T, D] and what attention gives the class token, [N, 1, D]."""
        token = x[:, :1] + self.drop_path1(token if self.gamma_1 is None else self.gamma_1 * token)
        out = self.mlp(self.norm2(token))
        return token + self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out)


class BeitClassTokenBlock(_WithGammas):
    """BEiT's: scores have a bias by relative position, of which the class token's row is needed."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        attn = self.attn
        tokens = _Normed(self.norm1, x)
        weight = attn.qkv.weight
        width = len(weight) // 3
        query = F.linear(tokens.first(), weight[:width], attn.q_bias).unflatten(1, (attn.num_heads, -1)) * attn.scale
        token = _folded(tokens, query, weight[width:], attn.v_bias, self._bias(shared_rel_pos_bias))
        return self._behind_attention(x, attn.proj_drop(attn.proj(token)))

    def _bias(self, shared: Tensor | None) -> Tensor | None:
        """[H, T]: of the class token's scores."""
        attn = self.attn
        row = None if shared is None else shared.reshape(-1, *shared.shape[-2:])[:, 0]
        if attn.relative_position_bias_table is None:
            return row
        own = attn.relative_position_bias_table[attn.relative_position_index[0]].T
        return own if row is None else own + row


class EvaClassTokenBlock(_WithGammas):
    """EVA's and DINOv3's: keys are rotated by their place; a prefix token, as the class token is one, never is."""

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        return self._behind_attention(x, self._attended(self.norm1(x), rope))

    def _attended(self, y: Tensor, rope: Tensor | None) -> Tensor:
        attn = self.attn
        depth, prefix = attn.head_dim, attn.num_prefix_tokens
        (w_query, b_query), (w_key, b_key), (w_value, b_value) = self._weights()
        # [N, 1, H * d] -> [N, H, 1, d]; [N, T, G * d] -> [N, G, T, d], with fewer heads of keys where they share
        query = attn.q_norm(F.linear(y[:, :1], w_query, b_query).unflatten(2, (-1, depth)).transpose(1, 2))
        key = attn.k_norm(F.linear(y, w_key, b_key).unflatten(2, (-1, depth)).transpose(1, 2))
        if rope is not None:
            turned = apply_rot_embed_cat(key[:, :, prefix:], rope, half=attn.rotate_half)
            key = torch.cat([key[:, :, :prefix], turned], dim=2).type_as(query)
        if attn.num_heads > key.shape[1]:
            key = key.repeat_interleave(attn.num_heads // key.shape[1], dim=1)
        shares = torch.softmax((query * attn.scale) @ key.transpose(2, 3), dim=-1).squeeze(2)
        token = attn.norm(_values(shares.to(y.dtype) @ y, w_value, b_value, depth))
        if attn.gate is not None:
            token = token * attn.gate(y[:, :1]).sigmoid()
        return attn.proj_drop(attn.proj(token))

    def _weights(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of queries, keys and values."""
        attn = self.attn
        if attn.qkv is None:
            return [(layer.weight, layer.bias) for layer in (attn.q_proj, attn.k_proj, attn.v_proj)]
        weights = attn.qkv.weight.chunk(3)
        if attn.qkv.bias is not None:
            return list(zip(weights, attn.qkv.bias.chunk(3), strict=True))
        if getattr(attn, "q_bias", None) is None:
            return [(weight, None) for weight in weights]
        return list(zip(weights, (attn.q_bias, None, attn.v_bias), strict=True))  # the keys' is 0 for ever


class _Normed:
    """What a block's first norm makes of its input `x` [N, T, D]: `plain` [N, T, D], times `gain`, plus `shift` [D].

    A norm that is not a LayerNorm is applied as it is, and leaves no gain and no shift.
    """

    def __init__(self, norm: nn.Module, x: Tensor):
        self.gain: Tensor | None = None
        self.shift: Tensor | None = None
        if isinstance(norm, nn.LayerNorm):
            self.plain = F.layer_norm(x, list(norm.normalized_shape), eps=norm.eps)
            self.gain, self.shift = norm.weight, norm.bias
        else:
            self.plain = norm(x)

    def first(self) -> Tensor:
        """The first token, normalised: [N, D]."""
        return self.scaled(self.plain[:, 0])

    def scaled(self, z: Tensor) -> Tensor:
        """Plain tokens, or a weighed mean of some, as the norm would give them: [..., D]."""
        scaled = z if self.gain is None else z * self.gain
        return scaled if self.shift is None else scaled + self.shift


def _folded(
    tokens: _Normed, query: Tensor, weight: Tensor, bias: Tensor | None, of_scores: Tensor | None = None
) -> Tensor:
    """Attention of one token without keys and values of all: [N, 1, H * d].

    Args:
        tokens: [N, T, D].
        query: [N, H, d], scaled.
        weight: [2 * H * d, D], of keys and values; bias: [H * d], of values.
        of_scores: [H, T], added to them.
    """
    heads, depth = query.shape[1:]
    w_key, w_value = weight.chunk(2)
    folded = torch.einsum("nhd,hdc->nhc", query, w_key.unflatten(0, (heads, depth)))
    folded = folded if tokens.gain is None else folded * tokens.gain  # the shift moves all scores alike
    scores = folded @ tokens.plain.transpose(1, 2)
    shares = torch.softmax(scores if of_scores is None else scores + of_scores, dim=-1)
    return _values(tokens.scaled(shares.to(tokens.plain.dtype) @ tokens.plain), w_value, bias, depth)


def _values(weighed: Tensor, weight: Tensor, bias: Tensor | None, depth: int) -> Tensor:
    """Values of weight [G * d, D] of what each head has weighed, [N, H, D]: [N, 1, H * d]."""
    of_heads = [None if tensor is None else tensor.unflatten(0, (-1, depth)) for tensor in (weight, bias)]
    if (groups := weighed.shape[1] * depth // len(weight)) > 1:
        of_heads = [None if tensor is None else tensor.repeat_interleave(groups, dim=0) for tensor in of_heads]
    value = torch.einsum("nhc,hdc->nhd", weighed, of_heads[0])
    return (value if of_heads[1] is None else value + of_heads[1]).flatten(1)[:, None]

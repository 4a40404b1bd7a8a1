"""The causal language model: one transformer, whose switches make it a GPT-2, BLOOM, OPT, LLaMA, Qwen or GPT-NeoX.

Not here: the switches (`architecture.py`), positions and masks (`positions.py`), names in Hugging Face files
(`pretrained.py`), sampling (`generate.py`), adapters, sharding.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from minirlhf.architecture import ACTIVATIONS, ModelConfig
from minirlhf.families import FAMILIES
from minirlhf.positions import make_view, rotate
from minirlhf.products import Ready, as_factor, as_logit_factor, linear, no_autocast, product


class Cache:
    """Keys and values of the tokens seen so far, in tensors of a fixed size (B, H_kv, max_len, D) per layer."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch, config.n_kv_head, max_len, config.head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.length = 0  # tokens written in every layer

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # (B, H_kv, T, D) → (B, H_kv, S, D)
        """Writes the new tokens of one layer and returns everything up to them; `length` moves after the last layer."""
        end = self.length + k.shape[2]
        keys, values = self.keys[layer], self.values[layer]
        assert end <= keys.shape[2], f"cache of {keys.shape[2]} tokens cannot hold {end}"
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def rows(self, index: Tensor) -> "Cache":  # index (B',) int64
        """A new cache with these rows, in this order: drops finished ones, or repeats a prompt's row."""
        new = object.__new__(Cache)
        new.keys = [t.index_select(0, index) for t in self.keys]
        new.values = [t.index_select(0, index) for t in self.values]
        new.length = self.length
        return new


class Linear(nn.Linear):
    """nn.Linear that draws nothing: `initialize` draws every weight from one explicit generator."""

    def reset_parameters(self) -> None:
        """Leaves the memory as it is."""

    def forward(self, x: Tensor) -> Tensor:  # (..., n_in) → (..., n_out)
        """x Wᵀ + b."""
        return linear(x, self.weight, self.bias)


class Head(Linear):
    """A bias-free linear map whose result is at least fp32, whatever the weights are: logits, scores and values."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (..., C) → (..., n_out)
        """Products of bf16 numbers summed in fp32 and never rounded back: bf16 logits cost 6 % of ratio noise.

        A logit does not depend on how many others there are, which would choose the library: see `prune_vocab`.
        """
        return logits(x, self.weight)


def logits(x: Tensor, weight: Tensor) -> Tensor:  # (..., C), (n_out, C) → (..., n_out)
    """x Wᵀ, at least fp32."""
    if len(weight) > 1:
        x, weight = as_logit_factor(x), as_logit_factor(weight)
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    with no_autocast(x.device.type):
        if x.is_cuda and x.dtype == weight.dtype and not torch.is_grad_enabled():  # 16-bit factors as they are
            return product(x.flatten(0, -2), weight.T).view(*x.shape[:-1], -1)
        return linear(x.to(dtype), weight.to(dtype), alike=len(weight) > 1)


class Embedding(nn.Embedding):
    """nn.Embedding that draws nothing."""

    def reset_parameters(self) -> None:
        """Leaves the memory as it is."""


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016, arXiv 1607.06450) or RMSNorm (Zhang, Sennrich 2019, arXiv 1910.07467); fp32 inside."""

    def __init__(self, kind: str, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = (size,), eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:  # (..., size) → same shape and dtype
        """Weights of a wider dtype than x widen the computation, not the result."""
        y: Tensor = x
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if x.dtype == torch.bfloat16 or x.dtype != weight.dtype:
            wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
            y, weight, bias = x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
        if bias is None:
            return torch.rms_norm(y, self.size, weight, self.eps).to(x.dtype)
        return torch.layer_norm(y, self.size, weight, bias, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, arXiv 1706.03762), keys in groups (Ainslie 2023, arXiv 2305.13245)."""

    ready: Ready | None = None  # in a stand-in of `prepared`: q, k and v side by side

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        H, K, D, C = config.n_head, config.n_kv_head, config.head_dim, config.d_model
        self.sizes, self.layout, self.dropout = (H, K, D), config.qkv, config.attn_dropout
        self.grouped = K != H
        if config.qkv == "split":
            self.q = Linear(C, H * D, bias=config.qkv_bias)
            self.k = Linear(C, K * D, bias=config.qkv_bias)
            self.v = Linear(C, K * D, bias=config.qkv_bias)
        else:
            self.qkv = Linear(C, 3 * H * D, bias=config.qkv_bias)
        self.q_norm = Norm("rms", D, config.norm_eps) if config.qk_norm else None
        self.k_norm = Norm("rms", D, config.norm_eps) if config.qk_norm else None
        self.out = Linear(H * D, C, bias=config.out_bias)

    def heads(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, ...]:  # (B, T, C) → (B, H, T, D), (B, H_kv, T, D) twice
        """Queries, keys and values, ready for attention; a packed matrix keeps the row order of the family's files."""
        B, T, _ = x.shape
        H, K, D = self.sizes
        if self.layout == "heads":
            q, k, v = self.qkv(x).view(B, T, -1, 3, D).permute(3, 0, 2, 1, 4).unbind(0)
        elif self.layout == "split" and self.ready is None:
            x = as_factor(x)  # once, not for each of the three
            q, k, v = (layer(x).view(B, T, -1, D).transpose(1, 2) for layer in (self.q, self.k, self.v))
        else:
            qkv = (self.qkv(x) if self.ready is None else self.ready(x)).view(B, T, -1, D).transpose(1, 2)
            if rope is not None and self.q_norm is None:  # queries and keys lie side by side: one rotation
                qk, v = qkv.split_with_sizes((H + K, K), 1)
                return *rotate(qk, rope).split_with_sizes((H, K), 1), v
            q, k, v = qkv.split_with_sizes((H, K, K), 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return q, k, v

    def forward(
        self,
        x: Tensor,  # (B, T, C)
        mask: Tensor | None,  # (B or 1, 1, T, S) True = visible, or (B, H, T, S) fp32 bias; None: causal
        rope: tuple[Tensor, Tensor] | None,  # cos, sin (B, 1, T, d)
        cache: Cache | None,
        layer: int,
    ) -> Tensor:  # (B, T, C)
        """softmax(q kᵀ / √D + bias) v, over the cached tokens and the new ones."""
        q, k, v = self.heads(x, rope)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        y = self.attend(q, k, v, mask)
        return self.out(y.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:  # (B, H, T, D)
        """torch's fused attention; with an ALiBi bias in fp32 all over, since bf16 has no exact integers above 256.

        On the CPU too, where torch's bf16 kernels take four to six times as long as the fp32 ones.
        """
        wide = torch.promote_types(q.dtype, torch.float32)
        alibi = mask is not None and mask.dtype not in (torch.bool, q.dtype)
        narrow = q.dtype != wide or torch.is_autocast_enabled(q.device.type)
        if narrow and (alibi or q.device.type == "cpu"):
            with no_autocast(q.device.type):
                return self.attend(q.to(wide), k.to(wide), v.to(wide), mask).to(q.dtype)
        p, causal = self.dropout if self.training else 0.0, mask is None and q.shape[2] > 1
        if self.grouped and q.shape[2] == 1 and (mask is None or mask.shape[1] == 1):
            heads = q.reshape(*k.shape[:2], -1, q.shape[3])  # (B, H_kv, H / H_kv, D): queries of one head
            return F.scaled_dot_product_attention(heads, k, v, mask, p).reshape(q.shape)
        return F.scaled_dot_product_attention(q, k, v, mask, p, causal, enable_gqa=self.grouped)


class MLP(nn.Module):
    """down(act(up x)), or down(act(gate x) · up x) with a gate (Shazeer 2020, arXiv 2002.05202)."""

    ready: Ready | None = None  # in a stand-in of `prepared`: act(up x), or gate x and up x side by side

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.activation]
        self.up = Linear(config.d_model, config.d_inner, bias=config.mlp_bias)
        self.gate = Linear(config.d_model, config.d_inner, bias=config.mlp_bias) if config.gated else None
        self.down = Linear(config.d_inner, config.d_model, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) → (B, T, C)
        """One hidden layer."""
        if self.gate is None:
            return self.down(self.act(self.up(x)) if self.ready is None else self.ready(x))
        if self.ready is None:
            x = as_factor(x)  # once for both
            gate, up = self.gate(x), self.up(x)
        else:
            gate, up = self.ready(x).chunk(2, -1)
        return self.down(self.act(gate) * up)


class Block(nn.Module):
    """Attention and MLP around the residual stream, one after the other or side by side (GPT-NeoX)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.parallel, self.dropout = config.parallel_residual, config.dropout
        self.norm1 = Norm(config.norm, config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = Norm(config.norm, config.d_model, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,  # (B, T, C)
        mask: Tensor | None,
        rope: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
        layer: int,
    ) -> Tensor:  # (B, T, C)
        """x + attn(n1 x), then + mlp(n2 ·) of that sum, or of x itself when parallel."""
        attended = x + self.drop(self.attn(self.norm1(x), mask, rope, cache, layer))
        return attended + self.drop(self.mlp(self.norm2(x if self.parallel else attended)))

    def drop(self, x: Tensor) -> Tensor:
        """Dropout on a branch."""
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Trunk(nn.Module):
    """Everything below the head: embedding, blocks, final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint = False  # recompute each block in the backward pass instead of keeping its activations
        C = config.d_model
        self.embed = Embedding(config.vocab_size, C)
        learned = config.position == "learned"
        self.pos_embed = Embedding(config.max_seq_len + config.position_offset, C) if learned else None
        self.embed_norm = Norm(config.norm, C, config.norm_eps) if config.embed_norm else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = Norm(config.norm, C, config.norm_eps)

    def forward(
        self,
        input_ids: Tensor,  # (B, T) int64; with a cache only the new tokens
        attention_mask: Tensor | None = None,  # (B, S) True = real token; S = cached + T
        *,
        cache: Cache | None = None,
        texts: Tensor | None = None,  # (B, T) int, a token's text, of several in a row that do not see each other
    ) -> Tensor:  # (B, T, C)
        """Hidden states after the final norm."""
        T, past = input_ids.shape[1], 0 if cache is None else cache.length
        if attention_mask is not None:
            assert attention_mask.shape == (input_ids.shape[0], past + T), (attention_mask.shape, input_ids.shape, past)
            attention_mask = attention_mask.to(torch.bool)
        x = self.embed(input_ids)  # (B, T, C)
        assert texts is None or (cache is None and texts.shape == input_ids.shape), "texts in a row and a cache"
        view = make_view(self.config, attention_mask, T, past, x, texts)
        if self.pos_embed is not None:
            x = x + self.pos_embed(view.positions + self.config.position_offset)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        if self.config.embed_dropout:
            x = F.dropout(x, self.config.embed_dropout, self.training)
        recompute = self.checkpoint and torch.is_grad_enabled() and cache is None
        for i, (block, mask) in enumerate(zip(self.blocks, view.masks, strict=True)):
            if recompute:
                x = checkpoint(block, x, mask, view.rope, cache, i, use_reentrant=False)
            else:
                x = block(x, mask, view.rope, cache, i)
        if cache is not None:
            cache.length += T
        return self.final_norm(x)


def logit_factors(head: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:  # (..., C) → (..., C), (V, C)
    """h and W of the logits W h, for those who multiply themselves; W + BA where an adapter is active on the head."""
    weight: Tensor = head.weight  # type: ignore[assignment]
    slot = vars(head).get("adapter")
    return as_logit_factor(hidden), as_logit_factor(weight if slot is None else slot[0].merged(weight))


class CausalLM(nn.Module):
    """p(token | tokens before it): a trunk and a head, which is the embedding itself when the config ties them."""

    def __init__(self, config: ModelConfig, *, rng: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.trunk = Trunk(config)
        self.head = Head(config.d_model, config.vocab_size)
        self.tie()
        initialize(self, rng)

    def tie(self) -> None:
        """Makes the head's weight the embedding's, where the config says so; after a load that replaced tensors too."""
        if self.config.tied:
            self.head.weight = self.trunk.embed.weight

    def hidden(
        self,
        input_ids: Tensor,  # (B, T) int64
        attention_mask: Tensor | None = None,  # (B, S) True = real token
        *,
        cache: Cache | None = None,
        texts: Tensor | None = None,  # (B, T) as in `Trunk`
    ) -> Tensor:  # (B, T, C)
        """Hidden states after the final norm, ready for the head."""
        return self.trunk(input_ids, attention_mask, cache=cache, texts=texts)

    def forward(
        self,
        input_ids: Tensor,  # (B, T) int64
        attention_mask: Tensor | None = None,  # (B, T) True = real token
    ) -> Tensor:  # (B, T, V), at least fp32
        """Logits of the next token after every position."""
        return self.head(self.hidden(input_ids, attention_mask))

    def module_names(self) -> dict[str, str]:
        """Our path of every module with weights → its path in the family's Hugging Face class."""
        return trunk_names(self.trunk) | {"head": FAMILIES[self.config.family].head}


def initialize(model: nn.Module, rng: torch.Generator | None = None) -> None:
    """Matrices and tables normal(0, 0.02) (Radford et al. 2019), biases 0, norms 1; drawn in the order of modules."""
    drawn = set()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight not in drawn:
            normal(module.weight, 0.02, rng)
            drawn.add(module.weight)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def normal(weight: Tensor, std: float, rng: torch.Generator | None) -> None:
    """Draws a weight, unless it has no memory yet: on `meta` torch would import its compiler to draw nothing."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std, generator=rng)


def trunk_names(trunk: Trunk) -> dict[str, str]:
    """Our path of every module of a trunk with weights → its path in the family's Hugging Face class."""
    family = FAMILIES[trunk.config.family]
    found = {}
    for path, module in trunk.named_modules():
        if not list(module.parameters(recurse=False)):
            continue
        if path.startswith("blocks."):
            _, i, rest = path.split(".", 2)
            theirs = family.layers.replace("N", i) + "." + family.names[rest]
        else:
            theirs = family.names[path]
        found["trunk." + path] = family.prefix + theirs
    return found

"""A trainable gpt-oss in plain PyTorch, numerically equal to transformers' GptOssForCausalLM.

Parameter names follow the Hugging Face checkpoint.  Two things differ in layout while training and are undone on export: gate and
up columns lie in two halves instead of interleaved, and every expert computes every token, weighted by zero where the router did
not choose it (for a few small experts that is faster than gathering).

Shapes: B sequences, T positions, S keys, N = B * T tokens, H hidden, A query heads, G key/value heads, D head_dim, E experts,
K experts per token, I expert intermediate size, V vocabulary.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

BASE_CONFIG = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "max_position_embeddings": 16384,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "rope_scaling": {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, "factor": 4.0,
                     "original_max_position_embeddings": 4096, "truncate": False},
    "router_aux_loss_coef": 0.01,
    "sliding_window": 128,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}


def make_config(vocabulary, special_ids, **overrides):
    """Complete config dictionary for the ids of harmony's special tokens."""
    config = dict(BASE_CONFIG, vocab_size=vocabulary, **overrides)
    config["layer_types"] = ["full_attention" if i % 2 else "sliding_attention" for i in range(config["num_hidden_layers"])]
    config["experts_per_token"] = config["num_experts_per_tok"]
    config["bos_token_id"] = special_ids["<|startoftext|>"]
    config["eos_token_id"] = special_ids["<|return|>"]
    config["pad_token_id"] = special_ids["<|endoftext|>"]
    return config


def yarn_inv_freq(config):
    """YaRN's inverse frequencies [D / 2] and the factor that multiplies cos and sin."""
    s, dim, base = config["rope_scaling"], config["head_dim"], config["rope_theta"]
    extrapolated = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    interpolated = extrapolated / s["factor"]

    def boundary(rotations):
        return dim * math.log(s["original_max_position_embeddings"] / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(boundary(s["beta_fast"]), 0), min(boundary(s["beta_slow"]), dim - 1)
    if s["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return interpolated * ramp + extrapolated * (1 - ramp), 0.1 * math.log(s["factor"]) + 1.0


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotate(x, cos, sin):
    """Rotary embedding on the two halves of the last axis: x [B, heads, T, D]."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def dense_attention(q, k, v, sinks, mask):
    """q [B, A, T, D], k and v [B, G, S, D], mask [B, 1, T, S] additive -> [B, A, T, D].

    The sink is a last key that only sees an extra coordinate of the query, which is 1; its value is zero.
    """
    b, heads, _, d = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    pad = 8
    q = F.pad(q * d ** -0.5, (0, pad))
    q[..., d] = 1
    sink = F.pad(sinks.to(v.dtype).view(1, -1, 1, 1), (d, pad - 1)).expand(b, -1, 1, -1)
    k = torch.cat([F.pad(k, (0, pad)), sink], 2)
    mask = F.pad(mask, (0, 1)).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, F.pad(v, (0, pad, 0, 1)), attn_mask=mask, scale=1.0)[..., :d]


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.a, self.g, self.d = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        h = config["hidden_size"]
        self.q_proj = nn.Linear(h, self.a * self.d)
        self.k_proj = nn.Linear(h, self.g * self.d)
        self.v_proj = nn.Linear(h, self.g * self.d)
        self.o_proj = nn.Linear(self.a * self.d, h)
        self.sinks = nn.Parameter(torch.zeros(self.a))

    def forward(self, x, cos, sin, attend):
        """x [B, T, H], cos and sin [B, 1, T, D / 2]; `attend(q, k, v, sinks)` -> [B, T, H]."""
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.a, self.d).transpose(1, 2)
        k = self.k_proj(x).view(b, t, self.g, self.d).transpose(1, 2)
        v = self.v_proj(x).view(b, t, self.g, self.d).transpose(1, 2)
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, self.sinks)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class Router(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config["num_local_experts"], config["hidden_size"]))
        self.bias = nn.Parameter(torch.zeros(config["num_local_experts"]))


class Experts(nn.Module):
    """Clamped SwiGLU experts; gate_up_proj [E, H, 2 I] holds the I gate columns first, then the I up columns."""

    def __init__(self, config):
        super().__init__()
        e, h, i = config["num_local_experts"], config["hidden_size"], config["intermediate_size"]
        self.gate_up_proj = nn.Parameter(torch.empty(e, h, 2 * i))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(e, 2 * i))
        self.down_proj = nn.Parameter(torch.empty(e, i, h))
        self.down_proj_bias = nn.Parameter(torch.zeros(e, h))
        self.alpha, self.limit = config["swiglu_alpha"], config["swiglu_limit"]

    def forward(self, x, share):
        """x [N, H], share [N, E] with zeros for experts that were not chosen -> [N, H]."""
        e, h, two_i = self.gate_up_proj.shape
        every = F.linear(x, self.gate_up_proj.permute(0, 2, 1).reshape(e * two_i, h), self.gate_up_proj_bias.flatten())
        gate, up = every.view(-1, e, two_i).chunk(2, -1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        hidden = (up + 1) * gate * torch.sigmoid(self.alpha * gate) * share[..., None].to(gate.dtype)
        return hidden.flatten(1) @ self.down_proj.flatten(0, 1) + share.to(x.dtype) @ self.down_proj_bias


class MoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.k = config["num_experts_per_tok"]
        self.router, self.experts = Router(config), Experts(config)

    def forward(self, x):
        """x [N, H] -> ([N, H], balance loss: E * sum(fraction routed * mean probability), 1 when balanced)."""
        logits = F.linear(x, self.router.weight, self.router.bias).float()
        top, index = logits.topk(self.k, -1)
        share = torch.zeros_like(logits).scatter(1, index, top.softmax(-1))
        routed = (share > 0).float().mean(0) / self.k
        balance = (routed * logits.softmax(-1).mean(0)).sum() * logits.shape[-1]
        return self.experts(x, share), balance


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MoE(config)
        self.input_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.post_attention_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])

    def forward(self, x, cos, sin, attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        y, balance = self.mlp(self.post_attention_layernorm(x).flatten(0, 1))
        return x + y.view_as(x), balance


class GptOss(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config["vocab_size"], config["hidden_size"]),
            "layers": nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"])),
            "norm": RMSNorm(config["hidden_size"], config["rms_norm_eps"]),
        })
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        inv_freq, self.rope_scale = yarn_inv_freq(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """Normal weights with variance 1 / fan_in; projections back to the residual stream are scaled down by depth."""
        depth = (2 * len(self.model["layers"])) ** -0.5
        for name, p in self.named_parameters():
            if name.endswith("norm.weight") or p.dim() == 1 or "bias" in name:
                continue
            fan_in = p.shape[-2] if "experts" in name else p.shape[-1]
            std = 0.05 if "embed" in name else 0.02 if "lm_head" in name or "router" in name else fan_in ** -0.5
            p.normal_(0, std * depth if "o_proj" in name or "down_proj" in name else std)

    def rope(self, position):
        """position [B, T] -> cos and sin [B, 1, T, D / 2]."""
        angle = position[:, None, :, None].float() * self.inv_freq
        return angle.cos() * self.rope_scale, angle.sin() * self.rope_scale

    def hidden(self, ids, position, attends):
        """ids, position [B, T] -> (final hidden states [B, T, H], mean balance loss).

        `attends[i](q, k, v, sinks)` is the attention of layer i: it knows masks and, when decoding, the cache.
        """
        cos, sin = self.rope(position)
        x = self.model["embed_tokens"](ids)
        total = 0.0
        for layer, attend in zip(self.model["layers"], attends):
            x, balance = layer(x, cos, sin, attend)
            total = total + balance
        return self.model["norm"](x), total / len(self.model["layers"])

    def masks(self, position, document):
        """Additive masks [B, 1, T, T] (full, sliding): causal within a document, the window includes the query."""
        order = torch.arange(position.shape[1], device=position.device)
        allowed = (order[:, None] >= order[None, :]) & (document[:, :, None] == document[:, None, :])
        near = allowed & (position[:, :, None] - position[:, None, :] < self.config["sliding_window"])
        zero = torch.zeros((), device=position.device)
        return tuple(torch.where(m, zero, -30000.0)[:, None] for m in (allowed, near))

    def dense_attends(self, position, document):
        """Attention of every layer with dense masks, on any device."""
        full, sliding = self.masks(position, document)

        def with_mask(mask):
            return lambda q, k, v, sinks: dense_attention(q, k, v, sinks, mask)

        return [with_mask(sliding if kind == "sliding_attention" else full) for kind in self.config["layer_types"]]

    def forward(self, ids, position=None, document=None):
        """ids [B, T] -> logits [B, T, V], float32 unless the weights are not."""
        if position is None:
            position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        if document is None:
            document = torch.zeros_like(ids)
        return self.lm_head(self.hidden(ids, position, self.dense_attends(position, document))[0])


def export_state(model, dtype=torch.bfloat16):
    """State dictionary in the Hugging Face layout: gate and up columns interleaved."""
    out = {}
    for name, p in model.state_dict().items():
        if name.endswith(("gate_up_proj", "gate_up_proj_bias")):
            p = torch.stack(p.chunk(2, -1), -1).flatten(-2)
        out[name] = p.detach().to("cpu", dtype).contiguous()
    return out


def import_state(model, state):
    """Load a state dictionary in the Hugging Face layout (inverse of `export_state`)."""
    own = {}
    for name, p in state.items():
        if name.endswith(("gate_up_proj", "gate_up_proj_bias")):
            p = torch.cat([p[..., ::2], p[..., 1::2]], -1)
        own[name] = p.float()
    model.load_state_dict(own)
    return model

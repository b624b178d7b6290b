"""The GPT written once more, slowly and by the book: loops over heads, dense masks, no shared code. Any dtype.

It is the independent reference of the fast model and reads nothing from it but parameters and options.
"""

import math

import torch


def textbook_logits(config, parameters, tokens, document_ids=None):
    """(B, T, vocab_size) logits by plain formulas."""
    return torch.stack(
        [
            _one_sequence(config, parameters, row, None if document_ids is None else document_ids[index])
            for index, row in enumerate(tokens)
        ]
    )


def _one_sequence(config, p, tokens, documents):
    length = len(tokens)
    documents = [0] * length if documents is None else documents.tolist()
    positions = [sum(documents[j] == documents[i] for j in range(i)) for i in range(length)]
    x = p["wte.weight"][tokens]
    if config.embedding == "scaled":
        x = x * math.sqrt(config.n_embd)
    elif config.embedding == "normed":
        x = _rms(x, {}, None, config.norm_eps)
    if config.position == "learned":
        x = x + p["wpe.weight"][torch.tensor(positions)]
    first_values = []
    for layer in range(config.n_layer):
        part = {name.removeprefix(f"h.{layer}."): value for name, value in p.items() if name.startswith(f"h.{layer}.")}
        others = first_values[:1] if config.value_residual else []
        for table in range(config.value_embeddings):
            if layer in (table, config.n_layer - config.value_embeddings + table):
                others = [*others, p[f"wve.{table}.weight"][tokens]]
        added, own = _attention(config, part, _norm(config, part, "ln_1", x), layer, positions, documents, others)
        first_values.append(own)
        x = x + added
        x = x + _mlp(config, part, _norm(config, part, "ln_2", x))
    head = p["wte.weight"] if config.tie_weights else p["lm_head.weight"]
    logits = _norm(config, p, "ln_f", x) @ head[: config.vocab_size].T
    cap = config.logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _rms(x, p, name, eps):
    normed = x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps)
    return normed * p[name] if name in p else normed


def _norm(config, p, name, x):
    if config.norm == "rmsnorm":
        return _rms(x, p, f"{name}.weight", config.norm_eps)
    centred = x - x.mean(-1, keepdim=True)
    out = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + config.norm_eps)
    if not config.norm_weights:
        return out
    out = out * p[f"{name}.weight"]
    return out + p[f"{name}.bias"] if config.bias else out


def _linear(config, p, name, x):
    out = x @ p[f"{name}.weight"].T
    return out + p[f"{name}.bias"] if config.bias else out


def _mlp(config, p, x):
    hidden = _linear(config, p, "mlp.c_fc", x)
    if config.mlp == "swiglu":
        gate = _linear(config, p, "mlp.c_gate", x)
        hidden = hidden * gate * torch.sigmoid(gate)
    elif config.mlp == "relu2":
        hidden = torch.clamp(hidden, min=0) ** 2
    elif config.mlp == "gelu":
        hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    else:
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return _linear(config, p, "mlp.c_proj", hidden)


def _rope(config, x, positions):
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = torch.tensor([p * config.rope_base ** (-i / half) for p in positions], dtype=x.dtype)
        out[:, i] = x[:, i] * torch.cos(angle) - x[:, i + half] * torch.sin(angle)
        out[:, i + half] = x[:, i + half] * torch.cos(angle) + x[:, i] * torch.sin(angle)
    return out


def _visible(length, window, documents):
    rows = [
        [j <= i and (window is None or i - j < window) and documents[i] == documents[j] for j in range(length)]
        for i in range(length)
    ]
    return torch.tensor(rows)


def _attention(config, p, x, layer, positions, documents, others):
    size = config.n_embd // config.n_head
    kv_heads = config.n_kv_head or config.n_head
    qkv = _linear(config, p, "attn.c_attn", x)
    q_end, k_end = config.n_head * size, (config.n_head + kv_heads) * size
    own = values = qkv[:, k_end:]
    if others:
        values = sum(p["attn.value_mix"][i] * each for i, each in enumerate([own, *others]))
    pattern = config.window_pattern or "S"
    window = config.window if pattern[layer % len(pattern)] == "S" else None
    visible = _visible(len(x), window, documents)

    def scores(q, k):
        if config.qk_norm:
            q = _rms(q, p, "attn.q_norm.weight", config.norm_eps)
            k = _rms(k, p, "attn.k_norm.weight", config.norm_eps)
        if config.position == "rope":
            q, k = _rope(config, q, positions), _rope(config, k, positions)
        logits = (q @ k.T / math.sqrt(q.shape[-1])).masked_fill(~visible, -math.inf)
        return torch.softmax(logits, dim=-1)

    heads = []
    for head in range(config.n_head):
        group = head // (config.n_head // kv_heads)
        q = qkv[:, head * size : (head + 1) * size]
        k = qkv[:, q_end + group * size : q_end + (group + 1) * size]
        v = values[:, group * size : (group + 1) * size]
        if config.attention == "softmax":
            heads.append(scores(q, k) @ v)
            continue
        start = 0.8 - 0.6 * math.exp(-0.3 * layer)
        dots = (p["attn.lambda_q"] * p["attn.lambda_k"]).sum(-1)
        strength = torch.exp(dots[0]) - torch.exp(dots[1]) + start
        half = size // 2
        weights = scores(q[:, :half], k[:, :half]) - strength * scores(q[:, half:], k[:, half:])
        heads.append(_rms(weights @ v, p, "attn.head_norm.weight", config.norm_eps) * (1 - start))
    return _linear(config, p, "attn.c_proj", torch.cat(heads, dim=-1)), own

#!/usr/bin/env python3
"""What a short, plain JAX program does on W: no library between the user and jit.  The number gvjax must not lose to.

Functions are pure; layers are a Python loop (variant scan: lax.scan on stacked weights); activations are [tokens, D]
around every linear layer, because XLA's CPU compiler makes the gradient of a gated MLP over [batch, time, D] twice as
slow (variant 3d shows it); token losses come from logsumexp minus a gather; decoding is one jitted lax.scan whose
carry holds one cache per layer.  Variants: scan, 3d, onehot, bf16,
remat, blocked (causal attention in blocks of 128 queries), icdf (sampling by the inverse distribution function)."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu") if not os.environ.get(
    "BENCH_GPU"
) else None
import common  # noqa: E402

a = common.args(["sft", "rm", "dpo", "gen", "online"])
import functools  # noqa: E402
import json  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax import lax  # noqa: E402

V = a.variants
hf = json.loads((a.dir / "config.json").read_text())
L, D, H, KV = (
    hf[k]
    for k in (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
    )
)
HD, EPS, THETA, VOC = (
    hf["head_dim"],
    hf["rms_norm_eps"],
    hf["rope_theta"],
    hf["vocab_size"],
)
DT = jnp.bfloat16 if "bf16" in V else jnp.float32


def load():
    from safetensors.numpy import load_file

    w = load_file(str(a.dir / "model.safetensors"))
    names = {
        "n1": "input_layernorm",
        "n2": "post_attention_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "g": "mlp.gate_proj",
        "u": "mlp.up_proj",
        "d": "mlp.down_proj",
    }

    def stack(n):
        return np.stack([w[f"model.layers.{i}.{n}.weight"].T for i in range(L)])

    return jax.tree.map(
        jnp.asarray,
        {
            "emb": w["model.embed_tokens.weight"],
            "norm": w["model.norm.weight"],
            "layers": {k: stack(n) for k, n in names.items()},
        },
    )


def norm(x, g):
    y = x.astype(jnp.float32)
    return (y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + EPS) * g).astype(x.dtype)


def rope(x, cs):
    c, s = cs
    x1, x2 = jnp.split(x, 2, -1)
    return jnp.concatenate([x1 * c - x2 * s, x2 * c + x1 * s], -1)


def angles(pos):  # pos [T] -> cos, sin [T, 1, HD/2]
    f = pos[:, None] * THETA ** (-jnp.arange(0, HD, 2) / HD)
    return jnp.cos(f)[:, None].astype(DT), jnp.sin(f)[:, None].astype(DT)


def layer(
    x, w, cs, mask, B, cache=None, at=None
):  # x [B*T, D], or [B, T, D] in variant 3d
    h = norm(x, w["n1"])
    q = rope((h @ w["q"]).reshape(B, -1, H, HD), cs)
    k = rope((h @ w["k"]).reshape(B, -1, KV, HD), cs)
    v = (h @ w["v"]).reshape(B, -1, KV, HD)
    T = q.shape[1]
    qh, kh, vh = (
        q.reshape(B, T, KV, H // KV, HD).transpose(0, 2, 3, 1, 4),
        k.swapaxes(1, 2),
        v.swapaxes(1, 2),
    )
    if cache is not None:  # head-major caches: no step transposes them whole
        kh = lax.dynamic_update_slice(cache[0], kh, (0, 0, at, 0))
        vh = lax.dynamic_update_slice(cache[1], vh, (0, 0, at, 0))

    def attend(lo, hi, end):
        s = jnp.einsum(
            "bkgtd,bksd->bkgts", qh[..., lo:hi, :] * HD**-0.5, kh[:, :, :end]
        ).astype(jnp.float32)
        p = jax.nn.softmax(jnp.where(mask[lo:hi, :end], s, -1e30), -1).astype(x.dtype)
        return jnp.einsum("bkgts,bksd->bkgtd", p, vh[:, :, :end])

    if (
        "blocked" in V and cache is None and T > 128
    ):  # causal: keys after the block are never touched
        o = jnp.concatenate(
            [attend(i, min(i + 128, T), min(i + 128, T)) for i in range(0, T, 128)], 3
        )
    else:
        o = attend(0, T, kh.shape[2])
    o = o.transpose(0, 3, 1, 2, 4).reshape(x.shape)
    x = x + o @ w["o"]
    h = norm(x, w["n2"])
    return x + (jax.nn.silu(h @ w["g"]) * (h @ w["u"])) @ w["d"], (kh, vh)


def hidden(p, ids):
    B, T = ids.shape
    cs, mask = angles(jnp.arange(T)), jnp.tril(jnp.ones((T, T), bool))

    def f(x, w):
        return (layer(x, w, cs, mask, B)[0], None)

    if "remat" in V:
        f = jax.checkpoint(f)
    x = p["emb"][ids if "3d" in V else ids.reshape(-1)]
    if "scan" in V:
        x, _ = lax.scan(f, x, p["layers"])
    else:
        for i in range(L):
            x, _ = f(x, jax.tree.map(lambda y, i=i: y[i], p["layers"]))
    return norm(x, p["norm"]).reshape(B, T, D)


def cast(p):
    return jax.tree.map(lambda x: x.astype(DT), p)


def token_logp(p, ids, start):
    """log p(ids[t] | ids[<t]) for t >= start."""
    h, y = hidden(p, ids)[:, start - 1 : -1].reshape(-1, D), ids[:, start:].reshape(-1)
    logits = (h @ p["emb"].T).astype(jnp.float32)
    if "onehot" in V:
        lp = jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(y, VOC), -1)
    else:
        lp = jnp.take_along_axis(logits, y[:, None], -1)[:, 0] - jax.nn.logsumexp(
            logits, -1
        )
    return lp.reshape(len(ids), -1)


tx = optax.chain(optax.clip_by_global_norm(common.CLIP), optax.adamw(common.LR))


def stepper(loss):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(p, o, *batch):
        val, g = jax.value_and_grad(lambda p: loss(cast(p), *batch))(p)
        u, o = tx.update(g, o, p)
        return optax.apply_updates(p, u), o, val

    return step


def draw(key, logits):
    if "icdf" not in V:
        return jax.random.categorical(key, logits)
    c = jnp.cumsum(
        jnp.exp(logits - logits.max(-1, keepdims=True)), -1
    )  # one uniform number a row, not a vocabulary
    u = jax.random.uniform(key, (len(c), 1)) * c[:, -1:]
    return jnp.minimum(jnp.sum(c < u, -1), VOC - 1)


@functools.partial(jax.jit, static_argnums=(3,))
def generate(p, ids, key, new):
    p = cast(p)
    B, T = ids.shape
    S = T + new
    ws = [jax.tree.map(lambda y, i=i: y[i], p["layers"]) for i in range(L)]

    def run(tok, pos, at, caches, mask):
        cs, x, out = angles(pos), p["emb"][tok.reshape(-1)], []
        for w, c in zip(ws, caches):
            x, c = layer(x, w, cs, mask, B, c, at)
            out.append(c)
        x = norm(x.reshape(B, -1, D)[:, -1], p["norm"])
        return (x @ p["emb"].T).astype(jnp.float32), out

    caches = [(jnp.zeros((B, KV, S, HD), DT),) * 2 for _ in range(L)]
    logits, caches = run(
        ids, jnp.arange(T), 0, caches, jnp.arange(S)[None] <= jnp.arange(T)[:, None]
    )

    def one(c, key):
        logits, caches, at = c
        tok = draw(key, logits)
        lp = jnp.take_along_axis(logits, tok[:, None], -1)[:, 0] - jax.nn.logsumexp(
            logits, -1
        )
        logits, caches = run(tok, at[None], at, caches, jnp.arange(S)[None] <= at)
        return (logits, caches, at + 1), (tok, lp)

    _, (toks, lps) = lax.scan(
        one, (logits, caches, jnp.int32(T)), jax.random.split(key, new)
    )
    return toks.T, lps.T


def main():
    s = common.Steps()
    P, C, R = common.pairs(a)
    n, t0 = len(P[0]) + len(C[0]), len(P[0])

    def rows(i):
        return np.arange(i * a.batch, (i + 1) * a.batch) % len(P)

    p = load()
    o = tx.init(p)
    key = jax.random.PRNGKey(0)
    if a.task == "sft":
        work = {"tokens": a.batch * n}
        step = stepper(lambda p, ids: -token_logp(p, ids, 1).mean())

        def go(p, o, i):
            return step(p, o, np.concatenate([P[rows(i)], C[rows(i)]], 1))
    elif a.task == "rm":
        work = {"tokens": 2 * a.batch * n, "pairs": a.batch}
        p["head"] = jnp.zeros((D, 1))
        o = tx.init(p)

        def loss(p, ids):
            r = (hidden(p, ids)[:, -1] @ p["head"])[:, 0]
            return -jax.nn.log_sigmoid(r[: a.batch] - r[a.batch :]).mean()

        step = stepper(loss)

        def go(p, o, i):
            return step(
                p,
                o,
                np.concatenate(
                    [np.concatenate([P[rows(i)], x[rows(i)]], 1) for x in (C, R)]
                ),
            )
    elif a.task == "dpo":
        work = {"tokens": 2 * a.batch * n, "pairs": a.batch}
        ref = jax.tree.map(jnp.copy, p)
        seq = jax.jit(lambda p, ids: token_logp(cast(p), ids, t0).sum(-1))

        def loss(p, ids, rl):
            d = token_logp(p, ids, t0).sum(-1) - rl
            return -jax.nn.log_sigmoid(0.1 * (d[: a.batch] - d[a.batch :])).mean()

        step = stepper(loss)

        def go(p, o, i):
            ids = np.concatenate(
                [np.concatenate([P[rows(i)], x[rows(i)]], 1) for x in (C, R)]
            )
            return step(p, o, ids, seq(ref, ids))
    elif a.task == "gen":
        work = {"tokens": a.batch * common.GEN_NEW}
        ids = P[: a.batch, : common.GEN_PROMPT]

        def go(p, o, i):
            return (
                p,
                o,
                generate(p, ids, jax.random.fold_in(key, i), common.GEN_NEW)[0],
            )
    else:
        work = {
            "samples": a.batch * common.K,
            "tokens": a.batch * common.K * common.GEN_NEW,
        }
        ref = jax.tree.map(jnp.copy, p)
        lps = jax.jit(lambda p, ids: token_logp(cast(p), ids, common.GEN_PROMPT))

        def loss(p, ids, rl, adv):
            lp = token_logp(p, ids, common.GEN_PROMPT)
            kl = jnp.exp(rl - lp) - (rl - lp) - 1
            return (
                -jnp.exp(lp - lax.stop_gradient(lp)) * adv[:, None]
                + common.BETA_KL * kl
            ).mean()

        step = stepper(loss)

        def go(p, o, i):
            ids = np.repeat(P[rows(i), : common.GEN_PROMPT], common.K, 0)
            out = np.asarray(
                generate(p, ids, jax.random.fold_in(key, i), common.GEN_NEW)[0]
            )
            r = np.array([len(set(x)) for x in out.tolist()], np.float32).reshape(
                -1, common.K
            )
            adv = (
                (r - r.mean(1, keepdims=True)) / (r.std(1, keepdims=True) + 1e-4)
            ).reshape(-1)
            ids = np.concatenate([ids, out], 1)
            return step(p, o, ids, lps(ref, ids), adv)

    s.start()
    for i in range(a.steps):
        p, o, out = go(p, o, i)
        jax.block_until_ready(out)
        s.end()
    common.emit("plain-jax", f"jax {jax.__version__}", a, s, work)


main()

"""The Qwen2 / Qwen2.5 / Qwen3 decoder in Flax NNX, one file from tokens to hidden states.

    x = embed[tokens]
    for each layer:  x += attention(rms_norm(x)) ;  x += swiglu(rms_norm(x))
    hidden = rms_norm(x) ;  logits = hidden @ unembed

Qwen2 adds biases to q, k, v; Qwen3 normalises each head of q and k instead; Qwen3-MoE has a
mixture of experts (`moe`) where the others have the gated MLP. The network computes in the dtype
of its parameters (cast them to choose), with norms, rotations and softmax in float32. Layers are
unrolled: decoding copies nothing and XLA's CPU programs run faster. Products with weights, and
what devices that share them tell each other, are in `linear`.

Axes: B rows, S positions, D width, N query heads, K key/value heads, R = N // K, H head width,
F MLP width, V vocabulary, W cache slots. Kernels are [in, out].
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from gspo_jax.algo.masked import float_dtype
from gspo_jax.mesh.sharding import constrain
from gspo_jax.models.attention import attend, check_attention, fused
from gspo_jax.models.cache import Cache, LayerCache, write
from gspo_jax.models.config import QwenConfig
from gspo_jax.models.init import constant, kernel
from gspo_jax.models.linear import beside, dense, joint, lookup, spread
from gspo_jax.models.moe import Experts, Routing, join
from gspo_jax.models.remat import check_remat, recomputed
from gspo_jax.models.rope import inverse_frequencies

Rope = tuple[Float[Array, "B 1 S H"], Float[Array, "B 1 S H"]]  # cos, sin


class Layer(nnx.Module):
    """One decoder block: pre-norm grouped-query attention, then a gated MLP or experts."""

    def __init__(
        self, config: QwenConfig, number: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32
    ):
        c = config
        D, F, H = c.hidden_size, c.intermediate_size, c.head_dim
        NH, KH = c.num_heads * H, c.num_kv_heads * H
        self.config = c
        self.input_norm = constant(1, (D,), ("norm",), dtype)
        self.q = kernel(rngs, (D, NH), ("embed", "heads"), dtype)
        self.k = kernel(rngs, (D, KH), ("embed", "kv_heads"), dtype)
        self.v = kernel(rngs, (D, KH), ("embed", "kv_heads"), dtype)
        self.o = kernel(rngs, (NH, D), ("heads", "embed"), dtype)
        if c.qkv_bias:
            self.q_bias = constant(0, (NH,), ("heads",), dtype)
            self.k_bias = constant(0, (KH,), ("kv_heads",), dtype)
            self.v_bias = constant(0, (KH,), ("kv_heads",), dtype)
        if c.qk_norm:
            self.q_norm = constant(1, (H,), ("norm",), dtype)
            self.k_norm = constant(1, (H,), ("norm",), dtype)
        self.post_norm = constant(1, (D,), ("norm",), dtype)
        self.sparse = c.is_sparse(number)
        if self.sparse:
            self.moe = Experts(c, rngs=rngs, dtype=dtype)
        else:
            self.gate = kernel(rngs, (D, F), ("embed", "mlp"), dtype)
            self.up = kernel(rngs, (D, F), ("embed", "mlp"), dtype)
            self.down = kernel(rngs, (F, D), ("mlp", "embed"), dtype)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        rope: Rope,
        allowed: Bool[Array, "B S W"] | None,
        cache: LayerCache | None = None,
        slot: Int[Array, ""] | int = 0,
        replay: Int[Array, "B S X"] | None = None,
        counted: Bool[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B S D"], LayerCache, Routing | None]:
        """The block's output, its keys and values, and where it has experts its routing.

        The keys and values are the written cache, or the new ones alone. `allowed` says which
        of them each position looks at; None is itself and those before it, by cuDNN.
        """
        eps = self.config.rms_norm_eps
        q, k, v = self._qkv(rms_norm(x, self.input_norm[...], eps), rope)
        cache = LayerCache(k, v) if cache is None else write(cache, k, v, jnp.int32(slot))
        values = fused(q, k, v) if allowed is None else attend(q, cache.k, cache.v, allowed)
        x = x + dense(values, self.o)[0]
        h = rms_norm(x, self.post_norm[...], eps)
        if self.sparse:
            y, routing = self.moe(h, replay, counted)
        else:
            gate, up = self._products(h, "gate", "up")
            y, routing = dense(jax.nn.silu(gate) * up, self.down)[0], None
        return constrain(x + y, "batch", None, None), cache, routing

    def _products(self, h: Float[Array, "B S D"], *names: str) -> list[Float[Array, "B S _"]]:
        """h times each of these kernels; of a sampler, times all of them at once."""
        if not hasattr(self, joined := "_".join(names)):
            return dense(h, *(getattr(self, name) for name in names))
        c = self.config
        NH, KH, F = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size
        width = {"q": NH, "k": KH, "v": KH, "gate": F, "up": F}
        return joint(h, getattr(self, joined), [width[name] for name in names])

    def _qkv(self, h: Float[Array, "B S D"], rope: Rope):
        """Queries [B, N, S, H], keys and values [B, K, S, H]; queries and keys rotated."""
        c = self.config
        q, k, v = self._products(h, "q", "k", "v")
        if c.qkv_bias:
            biases = (self.q_bias[...], self.k_bias[...], self.v_bias[...])
            q, k, v = (y + spread(bias, y.shape) for y, bias in zip((q, k, v), biases, strict=True))
        B, S, _ = h.shape
        q, k, v = (y.reshape(B, S, -1, c.head_dim) for y in (q, k, v))
        if c.qk_norm:
            q = rms_norm(q, self.q_norm[...], c.rms_norm_eps)
            k = rms_norm(k, self.k_norm[...], c.rms_norm_eps)
        q, k, v = (
            constrain(y.swapaxes(1, 2), "batch", heads, None, None)
            for y, heads in ((q, "heads"), (k, "kv_heads"), (v, "kv_heads"))
        )
        return rotate(q, rope), rotate(k, rope), v


def joined(model: "Qwen") -> "Qwen":
    """The same network, changed for sampling: kernels of a layer that multiply the same rows are
    one, since a token's time is that of launching small products. It is no longer to be trained."""
    for layer in model.layers:
        for names in (("q", "k", "v"), ("gate", "up")):
            if hasattr(layer, names[0]):
                kernels = [getattr(layer, name) for name in names]
                setattr(layer, "_".join(names), beside(*kernels))
                for name in names:
                    delattr(layer, name)
    return model


class Qwen(nnx.Module):
    """A Qwen language model; calling it gives hidden states, from which `logps` takes the rest."""

    def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        V, D = config.vocab_size, config.hidden_size
        self.config = config
        self.embed = kernel(rngs, (V, D), ("vocab", "embed"), dtype)
        self.layers = nnx.List(
            [Layer(config, i, rngs=rngs, dtype=dtype) for i in range(config.num_layers)]
        )
        self.final_norm = constant(1, (D,), ("norm",), dtype)
        if not config.tie_word_embeddings:
            self.head = kernel(rngs, (D, V), ("embed", "vocab"), dtype)

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        *,
        mask: Bool[Array, "B S"] | None = None,
        remat: str = "none",
        attention: str = "xla",
    ) -> Float[Array, "B S D"]:
        """Hidden states after the last norm; see `routed`."""
        return self.routed(tokens, mask=mask, remat=remat, attention=attention)[0]

    def routed(
        self,
        tokens: Int[Array, "B S"],
        *,
        mask: Bool[Array, "B S"] | None = None,
        remat: str = "none",
        attention: str = "xla",
        replay: Int[Array, "B S M X"] | None = None,
        counted: Bool[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B S D"], Routing | None]:
        """Hidden states after the last norm, and what the routers chose where there are experts.

        Args:
            tokens: token ids.
            mask: true on real tokens. Left- and right-padding both work; right-padded rows need
                none, since no real token looks to its right.
            remat: what the backward pass recomputes instead of keeping; see `remat`.
            attention: "xla", or "cudnn" where there is no mask (see `attention.choose`); layers
                with a window keep the former.
            replay: experts to use in the M layers that have them; negative ids are the router's.
            counted: the tokens over which the sums in `Routing` run; None is all.

        Raises:
            ConfigError: another `remat` or `attention`.
        """
        check_remat(remat)
        check_attention(attention)
        rope = self._rope(_positions(tokens, mask))
        masks: list[Array | None] = [*self._masks(_causal(tokens, mask))]
        if attention == "cudnn" and mask is None:
            masks = [m if self._has_window(i) else None for i, m in enumerate(masks)]
        x, routings = self._embed(tokens), []
        for layer, allowed in zip(self.layers, masks, strict=True):
            # The layers with experts take theirs in order.
            ids = None if replay is None or not layer.sparse else replay[:, :, len(routings)]
            graphdef, state = nnx.split(layer)

            def run(state, x, ids, graphdef=graphdef, allowed=allowed):
                layer = nnx.merge(graphdef, state)
                x, _, routing = layer(x, rope, allowed, replay=ids, counted=counted)
                return x, routing

            x, routing = recomputed(run, remat)(state, x, ids)
            routings += [] if routing is None else [routing]
        return rms_norm(x, self.final_norm[...], self.config.rms_norm_eps), join(routings)

    def prefill(
        self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]
    ) -> tuple[Float[Array, "B S D"], Cache, Int[Array, "B S M X"] | None]:
        """Hidden states of left-padded prompts, the cache they leave behind (S slots), and the
        experts that were chosen, where there are any."""
        rope = self._rope(_positions(tokens, mask))
        masks = self._masks(_causal(tokens, mask))
        x, caches, routings = self._embed(tokens), [], []
        for layer, allowed in zip(self.layers, masks, strict=True):
            x, cache, routing = layer(x, rope, allowed)
            caches.append(cache)
            routings += [] if routing is None else [routing]
        x = rms_norm(x, self.final_norm[...], self.config.rms_norm_eps)
        return x, tuple(caches), _experts(routings)

    def decode(
        self,
        token: Int[Array, " B"],
        cache: Cache,
        *,
        slot: Int[Array, ""],
        position: Int[Array, " B"],
        live: Bool[Array, "B W"],
    ) -> tuple[Float[Array, "B D"], Cache, Int[Array, "B 1 M X"] | None]:
        """One step: hidden state of one new token per row, the cache with it written, and the
        experts that it went to.

        Args:
            token: the new token of each row.
            cache: W slots per layer.
            slot: where the new token is written, the same for all rows.
            position: the token's own position in its text, for the rotation.
            live: slots that hold real tokens, the new one included.
        """
        rope, masks = self._rope(position[:, None]), self._masks(live[:, None], slot)
        x, caches, routings = self._embed(token[:, None]), [], []
        for layer, allowed, layer_cache in zip(self.layers, masks, cache, strict=True):
            x, written, routing = layer(x, rope, allowed, layer_cache, slot)
            caches.append(written)
            routings += [] if routing is None else [routing]
        x = rms_norm(x, self.final_norm[...], self.config.rms_norm_eps)
        return x[:, 0], tuple(caches), _experts(routings)

    def unembed(self) -> Float[Array, "D V"]:
        """The output head: its own matrix, or the embedding transposed where they are tied."""
        return self.embed[...].T if self.config.tie_word_embeddings else self.head[...]

    def unembed_axes(self) -> tuple[str | None, ...]:
        """The logical axes of `unembed`."""
        return self.embed.axes[::-1] if self.config.tie_word_embeddings else self.head.axes

    def logits(
        self, tokens: Int[Array, "B S"], *, mask: Bool[Array, "B S"] | None = None
    ) -> Float[Array, "B S V"]:
        """Logits of every position in float32: for small inputs and tests (see `logps`)."""
        return head_logits(self(tokens, mask=mask), self.unembed())

    def _embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        return constrain(lookup(self.embed, tokens), "batch", None, None)

    def _rope(self, positions: Int[Array, "B S"]) -> Rope:
        """cos and sin of position * frequency, each angle serving dimensions i and i + H/2."""
        c = self.config
        inv_freq, scale = inverse_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        angle = positions[:, None, :, None].astype(jnp.float32) * inv_freq[None, None, None]
        angle = jnp.concatenate([angle, angle], axis=-1)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return (cos, sin) if scale == 1 else (cos * scale, sin * scale)

    def _masks(
        self, allowed: Bool[Array, "B S W"], first: Int[Array, ""] | int = 0
    ) -> list[Bool[Array, "B S W"]]:
        """What each layer may look at: `allowed`, or of that the window's latest slots alone.

        Slots, not positions, are counted, as transformers does: real tokens lie side by side, so
        that both are the same. The S queries are the tokens in slots `first`, `first` + 1, ...
        """
        c = self.config
        if c.sliding_window is None:
            return [allowed] * c.num_layers
        S, W = allowed.shape[1:]
        back = (first + jnp.arange(S))[:, None] - jnp.arange(W)[None]
        near = allowed & (back < c.sliding_window)[None]
        return [near if self._has_window(i) else allowed for i in range(c.num_layers)]

    def _has_window(self, layer: int) -> bool:
        return self.config.sliding_window is not None and layer in self.config.window_layers


def _experts(layers: list[Routing]) -> Int[Array, "B S M X"] | None:
    routing = join(layers)
    return None if routing is None else routing.experts


def rms_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "*batch D"]:
    """x / sqrt(mean(x²) + eps) * scale, with the statistics in float32 at least."""
    wide = x.astype(float_dtype(x))
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * spread(scale, x.shape)


def rotate(x: Float[Array, "B N S H"], rope: Rope) -> Float[Array, "B N S H"]:
    """Rotary position embedding; dimension i turns together with i + H/2, as in Llama and Qwen."""
    cos, sin = rope
    wide = x.astype(float_dtype(x))
    half = x.shape[-1] // 2
    turned = jnp.concatenate([-wide[..., half:], wide[..., :half]], axis=-1)
    return (wide * cos.astype(wide.dtype) + turned * sin.astype(wide.dtype)).astype(x.dtype)


def head_logits(
    hidden: Float[Array, "*batch D"], unembed: Float[Array, "D V"]
) -> Float[Array, "*batch V"]:
    """hidden @ unembed, accumulated and returned in float32 at least."""
    wide = float_dtype(hidden)
    return jnp.einsum("...d,dv->...v", hidden, unembed, preferred_element_type=wide)


def _positions(tokens: Array, mask: Array | None) -> Int[Array, "B S"]:
    """0, 1, 2, ... over real tokens, wherever the padding lies."""
    if mask is None:
        return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, 0)


def _causal(tokens: Array, mask: Array | None) -> Bool[Array, "B S S"]:
    """May position i look at position j? j <= i, and j a real token."""
    B, S = tokens.shape
    allowed = jnp.tril(jnp.ones((S, S), bool))[None]
    return jnp.broadcast_to(allowed, (B, S, S)) if mask is None else allowed & mask[:, None]

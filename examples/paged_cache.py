"""A decoding loop of your own: the paged cache, and attention over it, in one donated `jax.jit`.

Sequences grow by a token per step. Pages are taken from the free ones inside the jitted step, a
sequence that ends gives its own back, and one that forks shares them with its copy until they part.
Nothing recompiles on the way.
"""

import functools

import jax
import jax.numpy as jnp

from flashmla_jax import flash_mla_with_kvcache
from flashmla_jax.cache.paged import PagedKVCache

BATCH, HEADS, LAYERS = 3, 16, 2


@functools.partial(jax.jit, donate_argnames="cache")
def step(cache, kv, q, active):
    """Appends a token to every active sequence, and attends from it.

    kv is [batch, 1, 1, 576] (512 latent and 64 RoPE numbers), q is [batch, 1, heads, 576].
    """
    cache, ok = cache.allocate(active.astype(jnp.int32))
    for layer in range(cache.num_layers):
        cache = cache.append(layer, kv)
        out, _ = flash_mla_with_kvcache(
            q, cache.pages[layer], cache.block_table, cache.cache_seqlens, softmax_scale=192**-0.5
        )
        q = q.at[..., :512].add(out)  # where a model would have its projections
    return cache, q, ok


def main():
    cache = PagedKVCache.create(
        num_layers=LAYERS, num_pages=6, batch=BATCH, max_pages_per_seq=4, dtype=jnp.bfloat16
    )
    free = jax.jit(PagedKVCache.free, donate_argnums=0)
    fork = jax.jit(PagedKVCache.fork, donate_argnums=0)
    key = jax.random.key(0)
    kv = jax.random.normal(key, (BATCH, 1, 1, 576), jnp.bfloat16)
    q = jax.random.normal(key, (BATCH, 1, HEADS, 576), jnp.bfloat16)
    active = jnp.array([True, True, False])

    for token in range(150):
        if token == 100:  # the second sequence ends, the third goes on from a copy of the first
            cache = free(cache, jnp.array([False, True, False]))
            cache = fork(cache, jnp.array([-1, -1, 0]))
            active = jnp.array([True, False, True])
        cache, _, ok = step(cache, kv, q, active)
        if not ok.all():
            raise SystemExit(f"the pool is full at token {token}")
        if token % 50 == 49:
            lengths, stats = cache.cache_seqlens.tolist(), cache.stats()
            print(
                f"token {token + 1}: {lengths=}, {stats.used} of {stats.num_pages} pages in use, "
                f"{stats.shared} of them shared"
            )
    print(cache.block_table)


if __name__ == "__main__":
    main()

"""The page format: how a cached token is laid out.

A page holds `PAGE_SIZE` tokens. A token is one latent vector of `HEAD_DIM` numbers: the compressed
key-value latent (`HEAD_DIM_V` numbers) followed by the rotated RoPE key. Keys are all of it, values
its first `HEAD_DIM_V` numbers. The same constants stand in `csrc/params.h`.
"""

import jax.numpy as jnp

PAGE_SIZE = 64
HEAD_DIM = 576
HEAD_DIM_V = 512

# What a page may be made of; float32 runs on the CPU only.
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)

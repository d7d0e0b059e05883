"""Continues prompts with a DeepSeek checkpoint, and prints tokens as they come.

    python examples/decode_checkpoint.py CHECKPOINT_DIR 1,5,7 2,4

The folder is in Hugging Face's format: config.json and safetensors. `flashmla-jax demo --random
--dir CHECKPOINT_DIR` writes a small one.
"""

import sys

import jax
import jax.numpy as jnp

from flashmla_jax.generate import Generation, Sampling
from flashmla_jax.models import deepseek, load_checkpoint


def main(checkpoint, *prompts):
    # The Hopper kernels take 16-bit types; the CPU takes float32 too.
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    config, params = load_checkpoint(checkpoint, dtype=dtype)
    params = deepseek.absorb(params, config)  # as decoding reads them

    generation = Generation(
        params,
        config,
        [[int(token) for token in prompt.split(",")] for prompt in prompts],
        max_new_tokens=32,
        sampling=Sampling(temperature=0.7, top_p=0.95, seed=0),
    )
    for step in generation:
        # One token per sequence; None for a sequence that has met its end-of-text token.
        print(*("-" if token is None else token for token in step.tokens), sep="\t", flush=True)
    print(f"{generation.cache.usage:.0%} of {generation.cache.num_pages} pages in use")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(f"usage: {sys.argv[0]} CHECKPOINT_DIR IDS [IDS ...]")
    main(*sys.argv[1:])

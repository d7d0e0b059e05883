"""Decoding over the devices of several processes: sequences and cached tokens divided among them.

One process, with the devices that it has:

    python multi_process_decode.py

Several, each started with its number, on the CPU (gloo) or with a GPU each (NCCL):

    python multi_process_decode.py --coordinator HOST:PORT --num-processes 2 --process-id 0
    python multi_process_decode.py --coordinator HOST:PORT --num-processes 2 --process-id 1

Sequences are divided along the mesh axis "batch", and the tokens of each along "context". A step
appends a token to every sequence and attends to it; pages stay on the devices where they are, and
only results travel. The last step's is compared with plain attention over all tokens.

When a process dies, the others end with an error after --heartbeat-timeout seconds at the latest.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flashmla_jax import parallel

HEADS, BATCH, SCALE = 16, 4, 192**-0.5
AXES = {"batch_axis": "batch", "context_axis": "context"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--coordinator", help="HOST:PORT of process 0, the same for all")
    parser.add_argument("--num-processes", type=int, default=1)
    parser.add_argument("--process-id", type=int, default=0)
    parser.add_argument("--context", type=int, help="devices that share a sequence; default: all")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--heartbeat-timeout", type=int, default=100, metavar="SECONDS")
    arguments = parser.parse_args()
    if arguments.coordinator:
        jax.distributed.initialize(
            arguments.coordinator,
            arguments.num_processes,
            arguments.process_id,
            heartbeat_timeout_seconds=arguments.heartbeat_timeout,
        )
    devices = jax.device_count()
    context = arguments.context or devices
    if devices % context or BATCH % (devices // context):
        raise SystemExit(f"{devices} devices cannot hold {BATCH} sequences, each on {context}")
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh(
        (devices // context, context), ("batch", "context"), axis_types=(auto, auto)
    )
    say = functools.partial(print, flush=True) if jax.process_index() == 0 else lambda _: None
    platform = jax.devices()[0].platform
    say(f"{devices} {platform} devices of {jax.process_count()} processes, {dict(mesh.shape)}")

    # What is made inside jit, from the same key everywhere, is made where it belongs.
    dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    pages_each = -(-arguments.tokens // (64 * context))  # of a sequence, on each of its devices
    local_batch = BATCH // (devices // context)
    pages = NamedSharding(mesh, P(("batch", "context")))
    along_batch, everywhere = NamedSharding(mesh, P("batch")), NamedSharding(mesh, P())

    @functools.partial(jax.jit, out_shardings=(pages, along_batch))
    def start():
        pool = jnp.zeros((devices * local_batch * pages_each, 64, 1, 576), dtype)
        table = jnp.arange(local_batch * pages_each, dtype=jnp.int32).reshape(local_batch, -1)
        return pool, jnp.tile(table, (devices // context, 1))

    def new_token(position):
        return jax.random.normal(jax.random.key(position), (BATCH, 1, 1, 576), dtype)

    def query(position):
        return jax.random.normal(jax.random.key(-1 - position), (BATCH, 1, HEADS, 576), dtype)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(pages, everywhere))
    def step(pool, table, position):
        lengths = jnp.full(BATCH, position, jnp.int32)
        one = jnp.ones(BATCH, jnp.int32)
        pool = parallel.cache_append(
            pool, new_token(position), table, lengths, one, mesh=mesh, **AXES
        )
        out, _ = parallel.flash_mla_with_kvcache(
            query(position), pool, table, lengths + 1, mesh=mesh, softmax_scale=SCALE, **AXES
        )
        return pool, out

    @jax.jit
    def plain(last):
        tokens = jax.vmap(new_token)(jnp.arange(arguments.tokens))[:, :, 0, 0].astype(jnp.float32)
        q = query(last)[:, 0].astype(jnp.float32)
        highest = jax.lax.Precision.HIGHEST
        scores = SCALE * jnp.einsum("bhd,tbd->bht", q, tokens, precision=highest)
        weights = jax.nn.softmax(scores, axis=-1)
        return jnp.einsum("bht,tbd->bhd", weights, tokens[..., :512], precision=highest)

    pool, table = start()
    for position in range(arguments.tokens):
        pool, out = step(pool, table, position)
        if position % 25 == 0:
            out.block_until_ready()
            say(f"token {position}")
    expected = plain(arguments.tokens - 1)
    difference = float(jnp.abs(jax.device_get(out)[:, 0].astype(jnp.float32) - expected).max())
    say(f"{arguments.tokens} tokens, {difference=:.1e}")
    if not difference < (1e-4 if dtype == jnp.float32 else 2e-2):
        raise SystemExit("the result is wrong")


if __name__ == "__main__":
    main()

"""Trains a small byte-level model with MLA, saves it as a checkpoint, and generates with it.

    python examples/train_tiny.py --out tiny
    flashmla-jax generate --checkpoint tiny --prompt "The "

It learns from the prose that ships with Python: the docstrings of the standard library and the
topics of `help()`. That takes a few minutes, on a CPU or, with a larger model, on a GPU. The
checkpoint has Hugging Face's format; `flashmla-jax demo` generates from one that was made so.
`--record FILE` writes what loss it reached and how long that took, from reading the prose to the
saved checkpoint, as benchmarks/ has its records.
"""

import argparse
import ast
import functools
import pydoc_data.topics
import re
import sys
import sysconfig
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from flashmla_jax.generate import Sampling, generate
from flashmla_jax.layers.nnx import MultiHeadLatentAttention
from flashmla_jax.models import DeepSeekConfig, load_checkpoint, save_checkpoint


def shape(hidden, layers, heads, head_dim, positions):
    return DeepSeekConfig(
        model_type="deepseek_v3",
        vocab_size=256,  # a token is a byte
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        q_lora_rank=None,
        qk_nope_head_dim=head_dim,
        v_head_dim=head_dim,
        max_position_embeddings=positions,
        eos_token_id=ord("\n"),  # which ends a paragraph
    )


SIZES = {
    "cpu": (
        shape(hidden=160, layers=3, heads=4, head_dim=32, positions=256),
        {"steps": 2800, "batch": 2, "rate": 1.5e-3},
    ),
    "gpu": (
        shape(hidden=384, layers=6, heads=6, head_dim=64, positions=512),
        {"steps": 250, "batch": 32, "rate": 1e-3},
    ),
}


class MLP(nnx.Module):
    def __init__(self, config, rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x):
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    def __init__(self, config, rngs):
        self.input_layernorm = nnx.RMSNorm(config.hidden_size, rngs=rngs)
        self.self_attn = MultiHeadLatentAttention(config.mla, rngs=rngs)
        self.post_attention_layernorm = nnx.RMSNorm(config.hidden_size, rngs=rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nnx.Module):
    """DeepSeek's network without experts; attributes have the names of its checkpoints."""

    def __init__(self, config, rngs):
        embedding_init = nnx.initializers.normal(1.0)  # not drowned by what the layers add
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, embedding_init=embedding_init, rngs=rngs
        )
        self.layers = nnx.List(Layer(config, rngs) for _ in range(config.num_hidden_layers))
        self.norm = nnx.RMSNorm(config.hidden_size, rngs=rngs)
        self.lm_head = nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def prose():
    """Paragraphs of English, one per line, from docstrings and help topics, each once."""
    texts = list(pydoc_data.topics.topics.values())
    library = Path(sysconfig.get_path("stdlib"))
    others = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    for path in sorted(library.rglob("*.py")):
        if others.isdisjoint(path.relative_to(library).parts):
            try:
                nodes = ast.walk(ast.parse(path.read_bytes()))
            except SyntaxError:  # templates, and files for lib2to3 to translate
                continue
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            texts += [
                ast.get_docstring(node) or "" for node in nodes if isinstance(node, documented)
            ]
    paragraphs = (" ".join(p.split()) for text in texts for p in re.split(r"\n\s*\n", text))
    is_prose = re.compile(r"[A-Z][A-Za-z ,;:.'\"()-]{60,}[.]")
    return "\n".join(dict.fromkeys(p for p in paragraphs if is_prose.fullmatch(p)))


def train(config, steps, batch, rate, seed):
    """The trained model, and how it went: its loss is in nats per byte, also on unseen text."""
    data = np.frombuffer(prose().encode(), np.uint8)
    seen, unseen = np.split(data, [-len(data) // 20])
    length = config.max_position_embeddings
    rng = np.random.default_rng(seed)

    def draw(text, batch):
        starts = rng.integers(0, len(text) - length, (batch, 1))
        return text[starts + np.arange(length + 1)].astype(np.int32)

    def loss_of(model, ids):
        logits = model(ids[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    @nnx.jit
    def step(model, optimizer, ids):
        loss, gradients = nnx.value_and_grad(loss_of)(model, ids)
        optimizer.update(model, gradients)
        return loss

    model = Model(config, nnx.Rngs(seed))
    rates = optax.warmup_cosine_decay_schedule(0, rate, steps // 20, steps, rate / 50)
    adamw = optax.adamw(rates, b2=0.99, weight_decay=0.1)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    optimizer = nnx.Optimizer(model, clipped, wrt=nnx.Param)
    size = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(f"{size / 1e6:.2f} M parameters, {len(data) / 1e3:.0f} KB of text")

    evaluate, test = nnx.jit(loss_of), draw(unseen, 16)
    start = time.perf_counter()
    for number in range(1, steps + 1):
        loss = step(model, optimizer, draw(seen, batch))
        if number % max(1, steps // 10) == 0 or number == steps:
            unseen_loss = evaluate(model, test)
            seconds = time.perf_counter() - start
            losses = f"loss {loss:.3f}, on unseen text {unseen_loss:.3f}"
            print(f"step {number}: {losses}, {seconds:.0f} s", flush=True)
    return model, {
        "parameters": size,
        "steps": steps,
        "loss": round(float(loss), 4),
        "loss_on_unseen_text": round(float(unseen_loss), 4),
    }


def save(path, config, model):
    """Writes a bfloat16 checkpoint, with a tokenizer for which a token is a byte."""
    parameters = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    save_checkpoint(path, config, jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters))
    # Byte-level tokenizers write each byte as a letter; those that are no letters come after 255.
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in letters]
    vocabulary = {chr(byte): byte for byte in letters}
    vocabulary |= {chr(256 + i): byte for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    return tokenizer


def main():
    default = "gpu" if jax.default_backend() == "gpu" else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default=default)
    parser.add_argument("--steps", type=int, help="default: as many as the size needs")
    parser.add_argument("--out", type=Path, default=Path("tiny"), help="the folder to make")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, metavar="FILE", help="write how it went there")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists")

    start = time.perf_counter()
    config, training = SIZES[args.size]
    training["steps"] = args.steps or training["steps"]
    model, results = train(config, seed=args.seed, **training)
    tokenizer = save(args.out, config, model)
    seconds = round(time.perf_counter() - start, 1)
    if args.record is not None:
        sys.path.append(str(Path(__file__).parents[1]))  # of this repository
        from benchmarks.record import write_record

        command = f"python examples/train_tiny.py --size {args.size} --steps {training['steps']}"
        sources = ("examples/train_tiny.py", "flashmla_jax/layers", "flashmla_jax/models")
        results = {"size": args.size, "seed": args.seed, "seconds": seconds, **results}
        write_record(args.record, results, command, sources)

    # The Hopper kernels take 16-bit types; the CPU takes float32 too.
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    config, params = load_checkpoint(args.out, dtype=dtype)
    prompts = ["The ", "Return a list of ", "If the file does not exist, "]
    ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    new = generate(params, config, ids, max_new_tokens=200, sampling=Sampling(temperature=0.4))
    for prompt, tokens in zip(prompts, new, strict=True):
        print(prompt + tokenizer.decode(tokens).rstrip())


if __name__ == "__main__":
    main()

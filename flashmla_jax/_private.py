"""All that is private in JAX and used here all the same, with the reason for each."""

from __future__ import annotations

import jaxlib.xla_client as xla_client
from jax._src import xla_bridge

try:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
except ImportError:
    cudnn = None  # type: ignore[assignment]

# xla_client: registers, by its name, what divides a custom call over devices. The public
# `custom_partitioning` puts a pointer to a Python function into every program instead, which no
# compilation cache and no exported program survives.
#
# xla_bridge: tells the same to GPU plug-ins when they load, of which the public interface knows
# nothing.
#
# cudnn: what `jax.nn.dot_product_attention(implementation="cudnn")` calls. The public function
# would do, but for the log-sum-exp, which it rounds to bfloat16: parts merged with that are
# weighted wrongly by up to 3 %. None where it is not found, and XLA attends.

__all__ = ["cudnn", "xla_bridge", "xla_client"]

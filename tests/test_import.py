"""What `import flashmla_jax` does, and what it leaves to those who ask for it."""

from __future__ import annotations

import json
import subprocess
import sys

OPTIONAL = ("flax", "matplotlib", "rich", "safetensors", "tokenizers", "tqdm", "transformers")
PROGRAM = """
import json, sys
import flashmla_jax
from jax._src import xla_bridge
packages = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps([xla_bridge.backends_are_initialized(), packages]))
"""


def test_import_creates_no_backend_and_needs_no_optional_package() -> None:
    command = [sys.executable, "-P", "-c", PROGRAM]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    initialised, packages = json.loads(ran.stdout)
    assert not initialised
    assert "flashmla_jax" in packages
    assert not set(OPTIONAL) & set(packages)

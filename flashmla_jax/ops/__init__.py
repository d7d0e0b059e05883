"""One file per XLA custom call."""

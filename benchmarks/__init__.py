"""What is measured, and how. Run as `python -m benchmarks.decode`; results/ keeps the records."""

"""Speed, memory, compile time and FLOPs of a config; see `mljax.bench.command`."""

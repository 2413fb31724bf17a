"""Latency and throughput of three ways to serve mixed requests; see ``benchmarks/README.md``."""

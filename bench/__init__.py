"""Benchmarks of lissom: paired, interleaved, checked before they are timed. See ``bench/README.md``."""

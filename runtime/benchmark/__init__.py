"""Latency on this hardware, by the calls that an application makes: python -m runtime.benchmark PACKAGE ...

Each package runs in a process of its own (`engine`), rounds alternate between them (`rounds`), and the clock stands
outside `TextGenerator` (`timing`). `limits` tells how far a device is from what its memory allows, and predicts lengths
that were not run; `gates` tells what is too slow. It may import what the runtime may, and the runtime; nothing of the
runtime imports it.
"""

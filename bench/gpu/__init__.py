"""Benchmarks on a GPU: ``python -m bench.gpu --out DIR`` (``make gpu-bench ARGS="--out DIR"``).

``timing.py`` how sides are timed; ``floors.py`` what the GPU can do at best; ``linear.py`` (int8, int4),
``sparse.py`` and ``losses.py`` the sides and their grids; ``figures.py`` the figures to reach and the tables;
``draw.py`` the plots; ``__main__.py`` the run. The method is in ``bench/README.md``.
"""

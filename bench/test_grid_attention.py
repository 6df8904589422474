"""``pytest bench/ --benchmark-json=out.json``: grid attention, ours and every peer, at a small and at the CPU shape."""

from vidkern.bench.cases import parametrised

test_grid_attention = parametrised("grid_attention", ("H", "cpu"))

"""``pytest bench/ --benchmark-json=out.json``: pyramid_decompose, ours and every peer."""

from vidkern.bench.cases import parametrised

test_pyramid_decompose = parametrised("pyramid_decompose", ("small", "cpu"))

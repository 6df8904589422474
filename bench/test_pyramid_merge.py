"""``pytest bench/ --benchmark-json=out.json``: pyramid_merge, ours and every peer."""

from vidkern.bench.cases import parametrised

test_pyramid_merge = parametrised("pyramid_merge", ("small", "cpu"))

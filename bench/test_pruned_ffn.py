"""``pytest bench/ --benchmark-json=out.json``: the tiled feed-forward network, ours and every peer."""

from vidkern.bench.cases import parametrised

test_pruned_ffn = parametrised("pruned_ffn", ("small", "cpu"))

"""``pytest bench/ --benchmark-json=out.json``: merging attention outputs, ours and every peer."""

from vidkern.bench.cases import parametrised

test_merge_attention = parametrised("merge_attention", ("small", "cpu"))

"""``pytest bench/ --benchmark-json=out.json``: the pruned linear layer, ours and every peer."""

from vidkern.bench.cases import parametrised

test_pruned_linear = parametrised("pruned_linear", ("small", "out_irregular"))

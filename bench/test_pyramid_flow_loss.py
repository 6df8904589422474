"""``pytest bench/ --benchmark-json=out.json``: pyramid_flow_loss, ours and every peer."""

from vidkern.bench.cases import parametrised

test_pyramid_flow_loss = parametrised("pyramid_flow_loss", ("small", "cpu"))

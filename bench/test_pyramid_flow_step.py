"""``pytest bench/ --benchmark-json=out.json``: pyramid_flow_step, ours and every peer."""

from vidkern.bench.cases import parametrised

test_pyramid_flow_step = parametrised("pyramid_flow_step", ("small", "cpu"))

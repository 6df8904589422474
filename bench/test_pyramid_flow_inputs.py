"""``pytest bench/ --benchmark-json=out.json``: pyramid_flow_inputs, ours and every peer."""

from vidkern.bench.cases import parametrised

test_pyramid_flow_inputs = parametrised("pyramid_flow_inputs", ("small", "cpu"))

"""``pytest bench/ --benchmark-json=out.json``: pyramid_stage_inputs, ours and every peer."""

from vidkern.bench.cases import parametrised

test_pyramid_stage_inputs = parametrised("pyramid_stage_inputs", ("small", "cpu"))

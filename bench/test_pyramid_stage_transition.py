"""``pytest bench/ --benchmark-json=out.json``: pyramid_stage_transition, ours and every peer."""

from vidkern.bench.cases import parametrised

test_pyramid_stage_transition = parametrised("pyramid_stage_transition", ("small", "cpu"))

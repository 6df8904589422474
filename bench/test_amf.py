"""``pytest bench/ --benchmark-json=out.json``: attention motion flow, ours and every peer."""

from vidkern.bench.cases import parametrised

test_attention_motion_flow = parametrised("attention_motion_flow", ("small", "cpu"))

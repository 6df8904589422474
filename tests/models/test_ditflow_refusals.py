"""Motion guidance refuses what cannot work, in words that name it: settings, single frames, references of other guides, files that cannot be written."""

import dataclasses
import re

import pytest
import torch

from vidkern.models.ditflow import FlowSampler, GuidanceConfig, GuidanceStopped, MotionGuidance, TinyAdapter, TinyVideoDiT, guidance, losses, score_blocks, smm, tiny

LABEL, NULL = torch.tensor([0]), torch.tensor([2])
CONFIG = GuidanceConfig(blocks=(2,), lr=(0.02, 0.01), share=0.5, updates=1, inject=())


@pytest.fixture
def adapter(randomise):
    return TinyAdapter(randomise(TinyVideoDiT(tiny())))


def latents(seed, frames=4):
    return torch.randn(1, frames, 8, 8, 10, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes, part", [
    ({"optimise": "weights"}, "optimise='weights'"), ({"signal": "raft"}, "signal='raft'"), ({"heads": "max"}, "heads='max'"),
    ({"compat": "x"}, "compat='x'"), ({"blocks": ()}, "at least one guidance block"), ({"share": 1.5}, "share=1.5"), ({"updates": 0}, "updates=0"),
    ({"updates": True}, "updates=True"), ({"lr": (0.1,)}, "lr=(0.1,)"), ({"lr": (0.1, 0)}, "lr=(0.1, 0)"), ({"lr": 0.1}, "lr=0.1: expected two"),
    ({"channels": 0}, "channels=0"), ({"channels": "few"}, "channels='few'"), ({"loss_scale": 0.5}, "loss_scale=0.5"),
    ({"loss_scale": float("nan")}, "loss_scale=nan"), ({"share": "half"}, "share='half'"), ({"share": float("nan")}, "share=nan"),
    ({"tau": 0}, "tau=0: expected a positive number"), ({"tau": -1.0}, "tau=-1.0"), ({"tau": float("nan")}, "tau=nan"), ({"tau": float("inf")}, "tau=inf"),
    ({"tau": "2"}, "tau='2'"), ({"tau": True}, "tau=True"), ({"blocks": 20}, "blocks=20: expected a tuple of block numbers"),
    ({"blocks": [20]}, "blocks=[20]"), ({"blocks": (2.0,)}, "blocks=(2.0,)"), ({"blocks": (True,)}, "blocks=(True,)"), ({"blocks": (-1,)}, "blocks=(-1,)"),
    ({"inject": 0}, "inject=0: expected a tuple"), ({"inject": None}, "inject=None"), ({"inject": ("0",)}, "inject=('0',)"),
    ({"threshold": 1}, "threshold=1: expected True or False"), ({"threshold": 0.5}, "threshold=0.5"), ({"checkpointing": None}, "checkpointing=None"),
    ({"pairs": "lower"}, "pairs: 'lower', expected \"all\""), ({"pairs": {"max_dt": -1}}, "pairs: {'max_dt': -1}"), ({"pairs": {"dt": 1}}, "pairs: {'dt': 1}"),
    ({"pairs": ((0, 1.0),)}, "pairs: (0, 1.0) in it"), ({"pairs": ()}, "pairs: empty"), ({"pairs": 3}, "pairs: int, expected")])
def test_settings_out_of_range(changes, part):
    with pytest.raises(ValueError, match=re.escape(part)) as caught:
        GuidanceConfig(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pairs", ["all", "upper", {"max_dt": 1}, [(0, 1), [3, 2]], ((0, 3),), torch.tensor([[0, 1], [1, 2]])], ids=repr)
def test_every_form_of_pairs_and_of_numbers_is_a_setting(adapter, pairs):
    guide = MotionGuidance(adapter, dataclasses.replace(CONFIG, pairs=pairs, tau=1, lr=[1, 0.5]))
    guide.extract(latents(1), NULL)
    guide.begin([1.0, 0.5], noise=latents(0), condition=LABEL)
    assert not torch.equal(guide.step(latents(0), 1.0), latents(0))


def test_one_frame_has_no_motion(adapter):
    with pytest.raises(ValueError, match=r"latents: shape \(1, 1, 8, 8, 10\) has 1 frames of patches, expected at least 2"):
        MotionGuidance(adapter, CONFIG).extract(latents(1, 1), NULL)
    with pytest.raises(ValueError, match=r"clips: shape \(1, 1, 8, 8, 10\) has 1 frames of patches, expected at least 2"):
        score_blocks(adapter, [(latents(1), (1, 0)), (latents(1, 1), (1, 0))], condition=NULL)
    assert MotionGuidance(adapter, CONFIG).extract(latents(1, 2), NULL).grid == (2, 8, 10)


def test_a_reference_of_another_guide_fits_or_is_refused(adapter):
    guide = MotionGuidance(adapter, CONFIG)
    flows, features = MotionGuidance(adapter, dataclasses.replace(CONFIG, blocks=(1, 3))), MotionGuidance(adapter, smm(blocks=(2,)))
    of_flows, of_features = flows.extract(latents(1), NULL), features.extract(latents(1), NULL)
    times, options = [1.0, 0.5], {"noise": latents(0), "condition": LABEL}
    for taker, given, part in (
        (guide, of_flows, "reference: has flows of blocks (1, 3), expected flows of blocks (2,), for signal='amf'"),
        (guide, of_features, "reference: has hidden of blocks (2,), expected flows of blocks (2,), for signal='amf'"),
        (features, of_flows, "reference: has flows of blocks (1, 3), expected hidden of blocks (2,), for signal='smm'"),
        (guide, dataclasses.replace(of_flows, flows={}), "reference: has neither flows nor hidden, expected flows of blocks (2,)"),
    ):
        with pytest.raises(ValueError, match=re.escape(part)):
            taker.begin(times, reference=given, **options)
    assert guide.reference is None      # what was refused is not kept
    one = MotionGuidance(adapter, dataclasses.replace(CONFIG, blocks=(3,)))
    one.begin(times, reference=of_flows, **options)      # more than is needed
    assert one.step(latents(0), 1.0).shape == latents(0).shape and len(one.history) == 1
    none = MotionGuidance(adapter, dataclasses.replace(CONFIG, optimise="none", inject=(0,)), add_noise=FlowSampler(2).add_noise)
    none.begin(times, reference=of_flows, **options)      # its latents alone are used


def test_inference_mode_has_no_gradients(adapter):
    guide = MotionGuidance(adapter, CONFIG)
    with torch.inference_mode():      # what was made there serves outside
        guide.extract(latents(1), NULL)
        noise = latents(0)
        guide.begin([1.0, 0.5], noise=noise, condition=LABEL)
        with pytest.raises(RuntimeError, match=r"step: called inside torch.inference_mode\(\), .*expected torch.no_grad\(\)"):
            guide.step(noise, 1.0)
        assert torch.equal(guide.step(noise, 0.5), noise)      # not a guided step
    with torch.no_grad():
        assert not torch.equal(guide.step(noise, 1.0), noise)


# ---- the file for the latents ----------------------------------------------------------------------------------------------------------------
def stopped(adapter, monkeypatch, rescue, before=lambda: None):
    """The GuidanceStopped of a run whose loss is not finite; `before` is called when the guide is ready."""
    monkeypatch.setattr(losses, "amf", lambda q, *args, **options: q.sum() * float("nan"))
    guide = MotionGuidance(adapter, CONFIG, rescue=rescue)
    guide.extract(latents(1), NULL)
    guide.begin([1.0, 0.5], noise=latents(0), condition=LABEL)
    before()
    with pytest.raises(GuidanceStopped, match="guided step 0") as caught:
        guide.step(latents(0), 1.0)
    assert torch.equal(caught.value.latents, latents(0)) and caught.value.step == 0
    return caught.value


def test_the_folder_of_the_rescued_latents_is_made(adapter, monkeypatch, tmp_path):
    path = tmp_path / "not" / "yet" / "rescue.pt"
    error = stopped(adapter, monkeypatch, str(path))
    assert error.path == path and torch.equal(torch.load(path, weights_only=True)["latents"], latents(0)) and f"are in {path};" in str(error)
    assert [p.name for p in path.parent.iterdir()] == ["rescue.pt"]


def test_a_rescue_that_cannot_be_written_is_told_at_once(adapter, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "rescue.pt", "/proc/none/rescue.pt"):
        with pytest.raises(ValueError, match=f"rescue='{path}': cannot be written .*expected a file") as caught:
            MotionGuidance(adapter, CONFIG, rescue=path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fails", [OSError("disk is full"), RuntimeError("no parent\nstack"), None], ids=["disk", "torch", "folder"])
def test_the_latents_are_kept_when_the_file_cannot_be_written_any_more(adapter, monkeypatch, tmp_path, fails):
    def breaking():
        if fails is None:
            (tmp_path / "gone").rmdir()
        else:
            monkeypatch.setattr(guidance.torch, "save", lambda *args: (_ for _ in ()).throw(fails))

    error = stopped(adapter, monkeypatch, tmp_path / "gone" / "rescue.pt", breaking)
    assert error.path is None and "are this error's .latents (" in str(error) and "cannot be written" in str(error) and "\n" not in str(error)

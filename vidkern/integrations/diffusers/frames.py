"""What a transformer's tokens are, frame by frame: the state that a model's forward writes and its attention processors read."""

from collections.abc import Mapping

import torch

from ...ops.grid_attention import FramePattern, GridPattern

RULES = ("causal_time", "window_time", "window_view", "cyclic_view", "anchors")
PATTERNS = '"dense", "grid", a mapping of grid rules, a FramePattern, or a callable frames -> FramePattern'


def check_pattern(pattern, views):
    """Raise for what can be seen to be wrong with ``pattern`` before the number of frames is known."""
    if isinstance(pattern, str):
        if pattern not in ("dense", "grid"):
            raise ValueError(f"pattern: {pattern!r}, expected {PATTERNS}")
    elif isinstance(pattern, Mapping):
        for name in pattern:
            if name not in RULES:
                raise ValueError(f"pattern: rule {name!r}, expected rules among {', '.join(RULES)}")
        GridPattern(views, 1, **{name: rule for name, rule in pattern.items() if name != "anchors"})
    elif not isinstance(pattern, FramePattern) and not callable(pattern):
        raise TypeError(f"pattern: {type(pattern).__name__}, expected {PATTERNS}")


def resolve_pattern(pattern, views, times):
    """The FramePattern of ``views * times`` frames, view-major, that ``pattern`` asks for."""
    frames = views * times
    if isinstance(pattern, str):
        return GridPattern(1, frames) if pattern == "dense" else GridPattern(views, times)
    if isinstance(pattern, Mapping):
        return GridPattern(views, times, **pattern)
    found = pattern if isinstance(pattern, FramePattern) else pattern(frames)
    if not isinstance(found, FramePattern):
        raise TypeError(f"pattern: the callable returned {type(found).__name__}, expected a vidkern.FramePattern")
    if found.n_frames != frames:
        raise ValueError(f"pattern: {found.n_frames} frames, expected the {frames} frames of hidden_states")
    return found


class Frames:
    """Frames of the forward pass in progress, shared by the attention processors of one model.

    Tokens of the video are view-major: ``(view * times + time) * tokens + n``.

    Args:
        pattern: which frame sees which, see :func:`enable_vidkern`.
        views: V, views stacked along the model's frame axis.

    Attributes:
        views: V; may be changed between forward passes.
        count, tokens: V * T, and tokens per frame N, as last set; None before.
        pattern: the resolved FramePattern of V * T frames; None before.

    Raises:
        TypeError, ValueError: ``pattern`` or ``views`` is not what is expected.
    """

    def __init__(self, pattern="dense", views=1):
        if isinstance(views, bool) or not isinstance(views, int) or views < 1:
            raise ValueError(f"views: {views!r}, expected an integer >= 1")
        check_pattern(pattern, views)
        self.rule, self.views = pattern, views
        self.count = self.tokens = self.pattern = None
        self._resolved = self._mask = self._text_len = None

    def set(self, frames, tokens):
        """Declare ``frames`` = V * T frames of ``tokens`` tokens each; processors use that until the next call.

        Raises:
            ValueError: the frames do not divide into views, one of the numbers is below 1, or the pattern has other frames.
        """
        if frames < 1 or tokens < 1:
            raise ValueError(f"hidden_states: {frames} frames of {tokens} tokens, expected at least one of each")
        if frames % self.views:
            raise ValueError(f"views: {self.views}, expected a divisor of the {frames} frames of hidden_states")
        if self._resolved != (self.views, frames):
            self.pattern = resolve_pattern(self.rule, self.views, frames // self.views)
            self._resolved = self.views, frames
        self.count, self.tokens = frames, tokens
        self._mask = self._text_len = None

    def check_length(self, length):
        """Raise unless ``length`` video tokens are what was declared."""
        if self.pattern is None:
            raise ValueError(
                f"hidden_states: {length} tokens of unknown frames, expected the whole transformer to be called first, or "
                "handle.frames.set(frames, tokens)"
            )
        if length != self.count * self.tokens:
            raise ValueError(
                f"hidden_states: {length} video tokens, expected {self.count} frames of {self.tokens} tokens; the sequence "
                "was cut or lengthened inside the model"
            )

    def text_len(self, mask, n_video, n_text):
        """int [B], the visible text tokens, of a key mask that shows all video tokens and a prefix of the text behind them.

        Looks at the values of the mask once per forward pass: blocks are handed one tensor, and looking waits for a GPU.

        Args:
            mask: bool [B, 1, 1, n_video + n_text] or None (all text visible).

        Raises:
            ValueError: another shape or dtype, or a mask that is no prefix of the text.
        """
        if mask is None:
            return None
        length = n_video + n_text
        if mask.dtype != torch.bool or mask.dim() != 4 or tuple(mask.shape[1:]) != (1, 1, length):
            raise ValueError(
                f"attention_mask: {mask.dtype} {tuple(mask.shape)}, expected torch.bool [B, 1, 1, {length}], a mask of keys"
            )
        compiling = torch.compiler.is_compiling()
        if not compiling and mask is self._mask:
            return self._text_len
        keys = mask[:, 0, 0]
        count = keys.sum(-1, keepdim=True)
        prefix = (keys == (torch.arange(length, device=mask.device) < count)) & (count >= n_video)
        wrong = "attention_mask: hides video tokens or text before visible text, expected all video and a prefix of the text"
        if compiling:
            torch._assert_async(prefix.all(), wrong)
        elif not prefix.all():
            raise ValueError(wrong)
        text_len = count[:, 0] - n_video
        if not compiling:
            self._mask, self._text_len = mask, text_len
        return text_len

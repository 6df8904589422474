"""Synchronised views faked from one ordinary clip: each view sees every frame through its own homography.

Source: 4Real-Video-V2 (arXiv:2506.18839), training data, "2D transformed videos". The distribution is ours: the corners move
linearly over the views, from their places to random ones within ``max_shift`` of the image size.

Coordinates are pixels, (x, y), integers at pixel centres. A homography ``H[v]`` maps a point of the input to where view v
shows it: ``p_v ~ H[v] @ (x, y, 1)``.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vidkern.errors import UserError


class ViewsError(UserError, ValueError):
    """An argument of a pseudo-view function is not what was expected."""


def homography_path(V: int, height: int, width: int, generator: torch.Generator, *, max_shift: float = 0.15) -> Tensor:
    """A random path of homographies that starts at the identity.

    Each image corner gets one displacement, uniform in ``±max_shift`` of the width (x) and height (y); view v applies the
    fraction ``v / (V - 1)`` of it.

    Args:
        V: number of views, at least 1.
        height, width: image size in pixels.
        generator: CPU generator; the same seed gives the same path.
        max_shift: in [0, 0.25): below a quarter the moved corners always span a convex quadrilateral.

    Returns:
        ``[V, 3, 3]`` float64, ``H[0]`` the identity exactly, ``H[v][2, 2] == 1``.

    Raises:
        ViewsError: an argument is out of range.
    """
    if V < 1:
        raise ViewsError(f"V={V}: expected at least 1 view")
    if min(height, width) < 2:
        raise ViewsError(f"height={height}, width={width}: expected at least 2 pixels each")
    if not 0 <= max_shift < 0.25:
        raise ViewsError(f"max_shift={max_shift}: expected 0 <= max_shift < 0.25 (a fraction of the image size)")
    size = torch.tensor([width, height], dtype=torch.float64)
    unit = torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1]], dtype=torch.float64)
    corners = unit * size - 0.5
    displacement = (2 * torch.rand(4, 2, generator=generator, dtype=torch.float64) - 1) * max_shift * size
    fraction = torch.linspace(0, 1, V, dtype=torch.float64) if V > 1 else torch.zeros(1, dtype=torch.float64)
    path = torch.stack([_from_corners(corners, corners + f * displacement) for f in fraction])
    path[0] = torch.eye(3, dtype=torch.float64)
    return path


def _from_corners(source: Tensor, target: Tensor) -> Tensor:
    """The homography ``[3, 3]`` that maps four points to four points (``[4, 2]`` each), float64."""
    (x, y), (u, v) = source.T, target.T
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    rows_u = torch.stack([x, y, one, zero, zero, zero, -u * x, -u * y], 1)
    rows_v = torch.stack([zero, zero, zero, x, y, one, -v * x, -v * y], 1)
    h = torch.linalg.solve(torch.cat([rows_u, rows_v]), torch.cat([u, v]))
    return torch.cat([h, h.new_ones(1)]).view(3, 3)


def _apply(H: Tensor, points: Tensor) -> Tensor:
    """``H`` on points ``[..., 2]``. Elementwise: a matmul of three columns costs more in waking threads than in work."""
    homogeneous = (points[..., None, :] * H[:, :2]).sum(-1) + H[:, 2]
    return homogeneous[..., :2] / homogeneous[..., 2:]


def warp(frames: Tensor, H: Tensor, *, window: tuple[int, int, int, int] | None = None) -> Tensor:
    """Shows frames through a homography: output pixel p is the input at ``inverse(H) @ p``, bilinear, zero outside.

    Args:
        frames: ``[..., h, w]``, floating; every frame and channel is moved alike.
        H: ``[3, 3]``, input pixels to output pixels.
        window: ``(top, left, height, width)``, the part of the output that is computed, in pixels; None: all ``h × w``.

    Returns:
        ``[..., height, width]``, of ``frames``' dtype.

    Raises:
        ViewsError: frames are not floating, or H is not ``[3, 3]``.
    """
    if frames.ndim < 2 or not frames.is_floating_point():
        raise ViewsError(f"frames of {frames.dtype}, shape {list(frames.shape)}: expected floating [..., height, width]")
    if H.shape != (3, 3):
        raise ViewsError(f"H of shape {list(H.shape)}: expected [3, 3]")
    h, w = frames.shape[-2:]
    top, left, height, width = window or (0, 0, h, w)
    y = torch.arange(top, top + height, dtype=torch.float64)
    x = torch.arange(left, left + width, dtype=torch.float64)
    output = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    source = _apply(torch.linalg.inv(H.cpu().double()), output)
    # grid_sample's own coordinates: -1 and 1 are the outer edges of the first and last pixel (align_corners=False)
    grid = (2 * source + 1) / torch.tensor([w, h], dtype=torch.float64) - 1
    # One image with all frames as channels: the grid is read once per pixel, not once per frame.
    stacked = frames.reshape(1, -1, h, w)
    grid = grid[None].to(frames)
    moved = F.grid_sample(stacked, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return moved.view(*frames.shape[:-2], height, width)


def common_window(H: Tensor, height: int, width: int, *, aspect: float | None = None) -> tuple[int, int, int, int]:
    """The largest window of one aspect ratio in which every view shows image and no border.

    Args:
        H: ``[V, 3, 3]``, input pixels to the pixels of each view.
        height, width: size of the input.
        aspect: width / height of the window; None: the input's.

    Returns:
        ``(top, left, height, width)`` in whole pixels, the same for all views.

    Raises:
        ViewsError: the views have no pixel in common.
    """
    aspect = width / height if aspect is None else aspect
    centres = torch.tensor([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]], dtype=torch.float64)
    quads = torch.stack([_apply(h, centres) for h in H.cpu().double()])
    edges = quads.roll(-1, 1) - quads
    inward = torch.stack([-edges[..., 1], edges[..., 0]], -1)  # y points down and the corners run clockwise on the screen
    # A window of height s has its outermost pixel centres (aspect * s - 1) / 2 and (s - 1) / 2 from its own centre c. All of
    # it is inside an edge while s * reach <= slack(c); the largest s at c is concave in c, so zooming in finds its peak.
    reach = (inward[..., 0].abs() * aspect + inward[..., 1].abs()) / 2
    offset = inward.abs().sum(-1) / 2 - (inward * quads).sum(-1)
    low, high = centres.amin(0), centres.amax(0)
    for _ in range(6):
        x, y = (torch.linspace(low[axis], high[axis], 17, dtype=torch.float64) for axis in (0, 1))
        c = torch.cartesian_prod(x, y)
        slack = (c[:, None] * inward.view(-1, 2)).sum(-1) + offset.view(-1)
        room = (slack / reach.view(-1)).amin(1)
        best, step = c[room.argmax()], (high - low) / 16
        low, high = best - step, best + step
    tall = room.max()
    half = (torch.stack([tall * aspect, tall]) - 1) / 2 + 1e-6  # a window that ends on a pixel keeps it
    left, top = (best - half).ceil().long().tolist()
    right, bottom = (best + half).floor().long().tolist()
    if right < left or bottom < top:
        raise ViewsError(f"height={height}, width={width}: too small, the {len(H)} views have no pixel in common")
    return top, left, bottom - top + 1, right - left + 1


def pseudo_views(
    clip: Tensor,
    V: int,
    generator: torch.Generator,
    crop: bool = True,
    *,
    max_shift: float = 0.15,
    size: tuple[int, int] | None = None,
    homographies: Tensor | None = None,
) -> Tensor:
    """V synchronised views of one clip: the homography changes with the view and is constant over time.

    Args:
        clip: ``[T, 3, H, W]``, floating.
        V: number of views.
        generator: CPU generator that :func:`homography_path` draws from.
        crop: cut all views to one window in which none shows a border. False: full frames, zero outside the image.
        max_shift: see :func:`homography_path`.
        size: ``(height, width)`` of the result; the window gets this aspect ratio and is resized (bilinear, antialiased).
            None keeps the pixels as they are. Needs ``crop``.
        homographies: ``[V, 3, 3]`` to use instead of drawing them.

    Returns:
        ``[V, T, 3, H', W']``. View 0 is the input's window exactly (resized where ``size`` is given).

    Raises:
        ViewsError: wrong rank or dtype, or an argument out of range.
    """
    if clip.ndim != 4 or not clip.is_floating_point():
        raise ViewsError(f"clip of {clip.dtype}, shape {list(clip.shape)}: expected floating [T, 3, H, W]")
    if size is not None and not crop:
        raise ViewsError(f"size={size}: expected None with crop=False")
    height, width = clip.shape[-2:]
    if homographies is None:
        homographies = homography_path(V, height, width, generator, max_shift=max_shift)
    elif homographies.shape != (V, 3, 3):
        raise ViewsError(f"homographies of shape {list(homographies.shape)}: expected [{V}, 3, 3]")
    window = (0, 0, height, width)
    if crop:
        window = common_window(homographies, height, width, aspect=size and size[1] / size[0])
    top, left, rows, columns = window
    identity = torch.eye(3, dtype=homographies.dtype, device=homographies.device)
    views = [
        clip[..., top : top + rows, left : left + columns] if torch.equal(H, identity) else warp(clip, H, window=window)
        for H in homographies
    ]
    if size is not None:
        views = [F.interpolate(view, size=size, mode="bilinear", antialias=True, align_corners=False) for view in views]
    return torch.stack(views)

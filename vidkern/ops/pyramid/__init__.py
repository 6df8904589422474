"""What the pyramid ops share: level shapes and layouts, reference filters, the noise generator, and the CPU launcher.

Levels are lists from coarse to fine. Inside the ops every level is [B, C, T, H, W] and an image has T = 1. Sources: Decomposable Flow
Matching (arXiv 2506.19839) for pyramids and flows, Pyramidal Flow (arXiv 2410.05954) for stages, Philox4x32-10 (Salmon et al., 2011).
"""

"""What the pruned ops share: lists of kept channels, argument checks, activations, and the kernels behind their launchers.

``pruned_linear`` and ``pruned_ffn`` are rooms of their own; this is the floor below them.
"""

"""Measures every op against its peers and against the ceilings of the machine it runs on; see README.md in this folder.

Importing it does no work. ``vidkern bench`` is the way in.
"""

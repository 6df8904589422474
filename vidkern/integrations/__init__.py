"""Adapters that let other libraries run on vidkern's ops; one package per library, no algorithms of their own."""

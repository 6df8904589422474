"""Is a backend right on this device: the accuracy rule, the probes, and the command that applies them.

``rooms`` says what there is to know about each op, ``accuracy`` and ``probes`` hold the checks, ``command`` runs them. The
checks are the ones of the test suite: there is one accuracy rule.
"""

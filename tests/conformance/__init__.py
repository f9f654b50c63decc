"""The conformance suite: what every method, optimizer and model has to satisfy.

`methods.py`, `optimizers.py` and `models.py` are tables. A new entry in one of them inherits every
test of this package; each entry of `methods.py` brings a readable autograd form of its method.
"""

"""The operators, one folder each.

`reference.py` is plain PyTorch, written for reading; `operator.py` has the public function, its checks, its
fake implementation and its autograd.
"""

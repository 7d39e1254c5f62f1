"""One folder an operator: `reference.py` (plain PyTorch, written for reading), `operator.py` (what users
call, its checks, its fake implementation and its autograd)."""

"""Training of the networks by their papers' recipes: `python -m mfkernels.train --help`.

It needs timm and torchvision: `pip install 'mfkernels[train]'`.
"""

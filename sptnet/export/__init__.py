"""A trained run as an ordinary model, which needs no code of ours: for timm, transformers, ONNX and torch.export.

folding.py   the prompt inside the position embedding of a plain timm ViT; what timm reads
graphs.py    the same with cosines and probabilities, as ONNX and as an exported program
origin.py    what the weights began from, and its licence
card.py      README.md of the folder
folder.py    all of it in one folder, checked; begin here
"""

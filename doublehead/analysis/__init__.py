"""The paper's analysis of heads: Figures 2-4 and 6-10, one module per figure family.

`doublehead analyze` is the command line.  Every module has `run(options, world)`; the options are in
`options`, which does not import PyTorch.
"""

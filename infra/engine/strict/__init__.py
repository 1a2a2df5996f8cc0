"""The strict strategy: a model's graph as a list of operations, run by kernels of our own.

The order of every addition is fixed by the text of the kernels, not by shapes, threads or the CPU:
the same bits come out whatever else is in a pass, on any number of threads, and on any processor
that follows IEEE 754. Nothing has to be padded and nothing is left to luck.

* :mod:`.vectors`: what numba cannot say itself, in LLVM's terms;
* :mod:`.elementwise`, :mod:`.linear`, :mod:`.attention`: the kernels;
* :mod:`.machine`: runs a program, on several threads, in one call per forward pass;
* :mod:`.program`: what a program is;
* :mod:`.tracing`, :mod:`.lowering`: make one of a transformers model;
* :mod:`.sites`: where in it rows can be seen;
* :mod:`.binding`, :mod:`.execution`: run it with the K/V of a store.
"""

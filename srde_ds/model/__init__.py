"""The adapter: which weights the experts change, by how much, and for which token.

    router.py       which experts a token uses, and the losses that keep them evenly used
    deltas.py       the values of the deltas           supports/     which weights they belong to
    layer.py        the equation                       dispatch.py   the experts' arithmetic in training
    prepared.py     the same in decoding               reference.py  the same in float64, for the tests
    policy.py       settings of one forward            adapter.py    a base with experts: attach, run, save, load

Names of tensors end in their shape: `x_TD` is `[T, D]`, `weights_TE` is `[T, E]`. The letters, in all of `srde_ds`:

    B   rows of a batch                     L   decoder layers of the base
    S   positions in a row                  D   hidden size
    T   tokens: B * S, or fewer             F   feed-forward size (intermediate size)
    E   experts                             A   atoms
    K   experts that a token uses (top_k)   m   neurons in a support
    W   processes                           b   blocks in a support
    P   processes that share the experts    n   values that an expert changes in a layer

A 1 stands for an axis of length one, and a number such as the 3 of `[D, E, 3, m]` for gate, up and down. In code about
supports and masks, S is the number of a layer's supports: 1 if the experts share one, else E. `supports/learned.py` has
B blocks of candidates, and `prepared.py` X experts: all of them, or one token's K.
"""

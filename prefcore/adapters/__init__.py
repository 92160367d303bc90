"""The functions through which other trainers take log-probs, entropies and losses, over prefcore.

:mod:`prefcore.adapters.verl` stands for those of verl 0.9.1, :mod:`prefcore.adapters.openrlhf` for those of OpenRLHF
0.11.2. Neither package is needed to import them: names, parameters, shapes and dtypes of results are theirs.
``enable()`` of either puts ours in place of the package's own, wherever it has imported them to, and ``disable()`` puts
those back.
"""

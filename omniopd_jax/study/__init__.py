"""Studies over many runs: a comparison of arms at equal teacher tokens, and the alignment of their gradients.

`design` says what is to be run, `search` chooses learning rates, `run` does one run and `measure` measures it,
`schedule` does them all; `statistics`, `results`, `figure` turn what was measured into tables, sentences and figures.
`alignment` compares gradients at a fixed student, before anything is trained.
"""

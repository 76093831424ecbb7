"""Other systems that serve the same models, measured as we are: one module each, one protocol for all.

`environment` installs them, `process` runs them; each of the other modules is the program that a peer's own interpreter
runs. They import nothing of Spanwise, and only `resident.py`, `streamed.py` and `quality.py` start them.
"""

"""The page of `lora-lite play`: a model and its adapters, side by side, in a browser on this machine.

jobs.py runs steps of work on one thread, forward.py puts rows of text through the model, generate.py writes, damage.py
and effect.py measure, fit.py makes vectors, heat.py maps them; server.py and guard.py are the web's side. It needs the
extra `play`.
"""

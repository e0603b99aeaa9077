"""Makes tests/golden from transformers: the values that our engine is held to.

Only this package needs torch and transformers; the tests read the files it wrote.
"""
